// The form of a new guest becomes a definition: a table of `ostler schema` with a table `host`.
export interface DefineForm {
  name: string;
  image: string;
  memory: string;
  cpus: string;
  command: string;
  ports: string;
  autostart: boolean;
  extra: string;
}

export const EMPTY_FORM: DefineForm = {
  name: "",
  image: "debian",
  memory: "512M",
  cpus: "1",
  command: "",
  ports: "",
  autostart: false,
  extra: "",
};

/** Throws an Error of one line for what the service could not even read; it judges the rest. */
export function definitionOf(form: DefineForm): Record<string, unknown> {
  const name = form.name.trim();
  if (!name) throw new Error("name: expected one");
  const cpus = Number(form.cpus);
  if (!Number.isInteger(cpus) || cpus < 1) throw new Error(`processors ${form.cpus}: expected a whole number from 1 on`);
  const extra = parseExtra(form.extra);
  const command = splitWords(form.command);
  const ports = form.ports.split(/[\s,]+/).filter(Boolean);
  const host = { ...(form.autostart ? { autostart: true } : {}), ...asTable(extra["host"]) };
  return {
    name,
    ...(form.image.trim() ? { image: form.image.trim() } : {}),
    memory: form.memory.trim(),
    cpus,
    ...(command.length ? { command } : {}),
    ...(ports.length ? { ports } : {}),
    ...extra,
    ...(Object.keys(host).length ? { host } : {}),
  };
}

/** Words as a shell would have them: quotes and backslashes, nothing else. Throws for an open quote. */
export function splitWords(text: string): string[] {
  const words: string[] = [];
  let word = "";
  let begun = false;
  let quote = "";
  for (let at = 0; at < text.length; at++) {
    const letter = text[at] ?? "";
    if (quote) {
      if (letter === quote) quote = "";
      else if (letter === "\\" && quote === '"' && at + 1 < text.length) word += text[++at] ?? "";
      else word += letter;
    } else if (letter === "'" || letter === '"') {
      quote = letter;
      begun = true;
    } else if (letter === "\\" && at + 1 < text.length) {
      word += text[++at] ?? "";
      begun = true;
    } else if (/\s/.test(letter)) {
      if (begun) words.push(word);
      word = "";
      begun = false;
    } else {
      word += letter;
      begun = true;
    }
  }
  if (quote) throw new Error(`command: a quote ${quote} that is not closed`);
  if (begun) words.push(word);
  return words;
}

function parseExtra(text: string): Record<string, unknown> {
  if (!text.trim()) return {};
  let found: unknown;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`more settings: no JSON: ${error instanceof Error ? error.message : String(error)}`);
  }
  if (typeof found !== "object" || found === null || Array.isArray(found)) {
    throw new Error("more settings: expected a JSON object");
  }
  return found as Record<string, unknown>;
}

const asTable = (value: unknown): Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value) ? (value as Record<string, unknown>) : {};
