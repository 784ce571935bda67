// The guest's console in a terminal. xterm writes its rules into <style> elements, which the content security policy
// forbids: it is given inert elements instead, and what it writes becomes constructed style sheets, which are allowed.
import { FitAddon } from "@xterm/addon-fit";
import { Terminal as Xterm } from "@xterm/xterm";
import "@xterm/xterm/css/xterm.css";
import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { Stream } from "../api/stream";
import { guestPath } from "../api/client";

const BACKLOG_BYTES = 65_536;
const LEAVE = "\x1d";

type ConsoleState = "connecting" | "live" | "ended" | "lost";

export default function Terminal({ name, readOnly }: { name: string; readOnly: boolean }): JSX.Element {
  const place = useRef<HTMLDivElement>(null);
  const [state, setState] = useState<ConsoleState>("connecting");

  useEffect(() => {
    const element = place.current;
    if (!element) return;
    const terminal = new Xterm({
      cursorBlink: true,
      disableStdin: readOnly,
      fontFamily: "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace",
      fontSize: 13,
      scrollback: 5000,
      documentOverride: documentWithoutStyleElements(),
      theme: { background: "#10131a", foreground: "#d7dae0", cursor: "#7aa2f7", selectionBackground: "#33415e" },
    });
    const fit = new FitAddon();
    terminal.loadAddon(fit);
    terminal.open(element);
    fit.fit();
    terminal.focus();
    const stream = new Stream({
      path: () => guestPath(name, `/console?backlog_bytes=${BACKLOG_BYTES}`),
      onOpen: () => {
        terminal.reset();
        setState("live");
      },
      onMessage: (data) => terminal.write(typeof data === "string" ? data : new Uint8Array(data)),
      onClose: (code) => {
        setState(code === 1000 ? "ended" : "lost");
        return code !== 1000 && code < 4400;
      },
    });
    const encoder = new TextEncoder();
    terminal.onData((text) => {
      // As on the command line, Ctrl-] leaves the console: the keyboard is the page's again.
      if (text === LEAVE) terminal.blur();
      else stream.send(encoder.encode(text));
    });
    terminal.onBinary((text) => stream.send(Uint8Array.from(text, (letter) => letter.charCodeAt(0) & 0xff)));
    const watcher = new ResizeObserver(() => fit.fit());
    watcher.observe(element);
    return () => {
      watcher.disconnect();
      stream.close();
      terminal.dispose();
    };
  }, [name, readOnly]);

  return (
    <div class="console">
      <div class={`console-bar ${state}`}>
        <span>
          {name} · {state === "live" ? (readOnly ? "read only" : "serial console") : state}
        </span>
        <small>
          <kbd>Ctrl</kbd>+<kbd>]</kbd> gives the keyboard back
        </small>
      </div>
      <div class="console-place" ref={place} data-state={state} />
    </div>
  );
}

function documentWithoutStyleElements(): Document {
  const createElement = (tag: string, settings?: ElementCreationOptions): HTMLElement => {
    if (tag.toLowerCase() !== "style") return document.createElement(tag, settings);
    const element = document.createElement("template");
    const sheet = new CSSStyleSheet();
    Object.defineProperty(element, "textContent", {
      set: (rules: string) => sheet.replaceSync(rules),
      get: () => "",
    });
    document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
    element.remove = () => {
      document.adoptedStyleSheets = document.adoptedStyleSheets.filter((each) => each !== sheet);
    };
    return element;
  };
  return new Proxy(document, {
    get(target, property) {
      if (property === "createElement") return createElement;
      const found: unknown = Reflect.get(target, property, target);
      return typeof found === "function" ? found.bind(target) : found;
    },
    set: (target, property, value) => Reflect.set(target, property, value, target),
  });
}
