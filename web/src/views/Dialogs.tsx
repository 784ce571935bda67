// Everything that asks before it does: new guests, snapshots, forks, moves, what cannot be undone. And the keys.
import type { ComponentChildren, JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { get, guestPath, post } from "../api/client";
import type { GuestView, ImageList } from "../api/types";
import { beginJob, dialog, go } from "../commands";
import { ACTIONS } from "../model/actions";
import { type DefineForm, EMPTY_FORM, definitionOf } from "../model/definition";
import { Key } from "../ui/parts";

export function Dialogs(): JSX.Element | null {
  const shown = dialog.value;
  if (!shown) return null;
  switch (shown.kind) {
    case "define":
      return <Define />;
    case "help":
      return <Help />;
    case "snapshot":
      return <Snapshot guest={shown.guest} />;
    case "fork":
      return <Fork guest={shown.guest} />;
    case "migrate":
      return <Migrate guest={shown.guest} />;
    case "confirm":
      return (
        <Form title={shown.title} verb={shown.verb} danger run={shown.run}>
          <p>{shown.text}</p>
        </Form>
      );
  }
}

interface FormProps {
  title: string;
  verb: string;
  run: () => Promise<unknown>;
  danger?: boolean;
  children: ComponentChildren;
}

function Form({ title, verb, run, danger, children }: FormProps): JSX.Element {
  const [said, setSaid] = useState("");
  const [busy, setBusy] = useState(false);
  const submit = async (event: Event): Promise<void> => {
    event.preventDefault();
    setBusy(true);
    setSaid("");
    try {
      await run();
      dialog.value = null;
    } catch (error) {
      setSaid(error instanceof Error ? error.message : String(error));
    } finally {
      setBusy(false);
    }
  };
  return (
    <Modal title={title}>
      <form onSubmit={(event) => void submit(event)}>
        {children}
        {said && (
          <p class="error" role="alert">
            {said}
          </p>
        )}
        <footer>
          <button type="button" onClick={() => (dialog.value = null)}>
            Cancel
          </button>
          <button class={danger ? "danger solid" : "primary"} disabled={busy}>
            {verb}
          </button>
        </footer>
      </form>
    </Modal>
  );
}

function Modal({ title, children }: { title: string; children: ComponentChildren }): JSX.Element {
  const place = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    place.current?.showModal();
    place.current?.querySelector<HTMLElement>("input, button.primary, button.danger")?.focus();
  }, []);
  return (
    <dialog ref={place} onClose={() => (dialog.value = null)} aria-label={title}>
      <h2>{title}</h2>
      {children}
    </dialog>
  );
}

function Field(props: { label: string; hint?: string; children: ComponentChildren }): JSX.Element {
  return (
    <label>
      {props.label}
      {props.children}
      {props.hint && <small>{props.hint}</small>}
    </label>
  );
}

function Define(): JSX.Element {
  const [form, setForm] = useState<DefineForm>(EMPTY_FORM);
  const [start, setStart] = useState(true);
  const [images, setImages] = useState<string[]>([]);
  useEffect(() => {
    get<ImageList>("/v1/images").then(
      (found) => setImages(found.images.map((image) => image.name)),
      () => undefined,
    );
  }, []);
  const text = (name: Exclude<keyof DefineForm, "autostart">, rest: JSX.InputHTMLAttributes<HTMLInputElement> = {}): JSX.Element => (
    <input name={name} value={form[name]} onInput={(event) => setForm({ ...form, [name]: event.currentTarget.value })} {...rest} />
  );
  const run = async (): Promise<void> => {
    const definition = definitionOf(form);
    await post("/v1/guests", { definition, start });
    go({ page: "guest", name: String(definition["name"]), tab: "charts" });
  };
  return (
    <Form title="New guest" verb={start ? "Define and start" : "Define"} run={run}>
      <div class="grid">
        <Field label="Name">{text("name", { required: true })}</Field>
        <Field label="Image">
          {text("image", { list: "images" })}
          <datalist id="images">
            {images.map((name) => (
              <option key={name} value={name} />
            ))}
          </datalist>
        </Field>
        <Field label="Memory">{text("memory", { required: true })}</Field>
        <Field label="Processors">{text("cpus", { type: "number", min: 1 })}</Field>
      </div>
      <Field label="Command" hint="Empty: what the image says.">
        {text("command")}
      </Field>
      <Field label="Ports" hint="HOST:GUEST, several with blanks between.">
        {text("ports", { placeholder: "8080:80" })}
      </Field>
      <details>
        <summary>More settings</summary>
        <Field label="As JSON" hint="Any field of `ostler schema`, and host: restart, reserve, depends_on…">
          <textarea
            name="extra"
            rows={4}
            value={form.extra}
            onInput={(event) => setForm({ ...form, extra: event.currentTarget.value })}
            placeholder='{"host": {"restart": {"policy": "on-failure"}}}'
          />
        </Field>
      </details>
      <div class="checks">
        <Check label="Start now" value={start} set={setStart} />
        <Check label="Start with the host" value={form.autostart} set={(autostart) => setForm({ ...form, autostart })} />
      </div>
    </Form>
  );
}

function Check({ label, value, set }: { label: string; value: boolean; set: (value: boolean) => void }): JSX.Element {
  return (
    <label class="check">
      <input type="checkbox" checked={value} onChange={(event) => set(event.currentTarget.checked)} /> {label}
    </label>
  );
}

function Snapshot({ guest }: { guest: GuestView }): JSX.Element {
  const [name, setName] = useState(`${guest.name}-1`);
  const [freeze, setFreeze] = useState(false);
  const [replace, setReplace] = useState(false);
  const run = (): Promise<void> => beginJob(guestPath(guest.name, "/snapshots"), { name: name.trim(), freeze, replace });
  return (
    <Form title={`Snapshot of ${guest.name}`} verb="Save" run={run}>
      <Field label="Name" hint="The guest goes on while it is written.">
        <input name="snapshot" value={name} required onInput={(event) => setName(event.currentTarget.value)} />
      </Field>
      <div class="checks">
        <Check label="Freeze its file systems" value={freeze} set={setFreeze} />
        <Check label="Replace one of that name" value={replace} set={setReplace} />
      </div>
    </Form>
  );
}

function Fork({ guest }: { guest: GuestView }): JSX.Element {
  const [name, setName] = useState("");
  const [count, setCount] = useState("1");
  const run = (): Promise<void> =>
    beginJob(guestPath(guest.name, "/fork"), { ...(name.trim() ? { name: name.trim() } : {}), count: Number(count) });
  return (
    <Form title={`Fork ${guest.name}`} verb="Fork" run={run}>
      <div class="grid">
        <Field label="Name" hint="Empty: made up.">
          <input name="fork" value={name} onInput={(event) => setName(event.currentTarget.value)} />
        </Field>
        <Field label="How many">
          <input type="number" min={1} max={100} value={count} onInput={(event) => setCount(event.currentTarget.value)} />
        </Field>
      </div>
    </Form>
  );
}

function Migrate({ guest }: { guest: GuestView }): JSX.Element {
  const [address, setAddress] = useState("tcp://");
  const [files, setFiles] = useState({ tls_cert: "", tls_key: "", tls_ca: "" });
  const [insecure, setInsecure] = useState(false);
  const [postCopy, setPostCopy] = useState("auto");
  const run = (): Promise<void> => {
    const given = Object.fromEntries(Object.entries(files).filter(([, path]) => path.trim()));
    return beginJob(guestPath(guest.name, "/migrate"), { address: address.trim(), insecure, post_copy: postCopy, ...given });
  };
  const file = (name: keyof typeof files, label: string): JSX.Element => (
    <Field label={label}>
      <input value={files[name]} onInput={(event) => setFiles({ ...files, [name]: event.currentTarget.value })} />
    </Field>
  );
  return (
    <Form title={`Migrate ${guest.name}`} verb="Migrate" run={run}>
      <Field label="Address" hint="Where `ostler receive` listens.">
        <input name="address" value={address} required onInput={(event) => setAddress(event.currentTarget.value)} />
      </Field>
      <div class="grid three">
        {file("tls_cert", "Certificate")}
        {file("tls_key", "Key")}
        {file("tls_ca", "Authority")}
      </div>
      <Field label="If it writes faster than the link carries">
        <select value={postCopy} onChange={(event) => setPostCopy(event.currentTarget.value)}>
          <option value="auto">it goes before its memory has (post-copy)</option>
          <option value="never">it stays until memory fits the pause</option>
          <option value="now">post-copy from the start</option>
        </select>
      </Field>
      <div class="checks">
        <Check label="Without TLS" value={insecure} set={setInsecure} />
      </div>
    </Form>
  );
}

const PAGE_KEYS: [string, string][] = [
  ["j k", "next, previous guest"],
  ["Enter", "open it"],
  ["1 … 4", "charts, console, log, details"],
  ["/", "filter"],
  ["c", "new guest"],
  ["g  t  a", "guests, snapshots, activity"],
  ["Esc", "back"],
  ["Ctrl ]", "leave the console"],
];

function Help(): JSX.Element {
  return (
    <Modal title="Keys">
      <div class="columns keys">
        <dl>
          {PAGE_KEYS.map(([keys, what]) => (
            <div key={keys}>
              <dt>
                {keys.split(" ").map((key) => key && <Key key={key}>{key}</Key>)}
              </dt>
              <dd>{what}</dd>
            </div>
          ))}
        </dl>
        <dl>
          {ACTIONS.map((action) => (
            <div key={action.id}>
              <dt>
                <Key>{action.key}</Key>
              </dt>
              <dd>{action.label.replace("…", "").toLowerCase()}</dd>
            </div>
          ))}
        </dl>
      </div>
      <form method="dialog">
        <footer>
          <button class="primary">Close</button>
        </footer>
      </form>
    </Modal>
  );
}
