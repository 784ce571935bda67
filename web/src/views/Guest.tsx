// One guest: charts, console, log, all that is known.
import type { JSX } from "preact";
import { lazy, Suspense } from "preact/compat";
import { useEffect, useState } from "preact/hooks";
import { get, guestPath } from "../api/client";
import type { GuestDetail, GuestView, Logs } from "../api/types";
import { complain } from "../commands";
import { allows } from "../model/actions";
import { bytes, cpus, dateTime, duration } from "../model/format";
import { TABS, type Tab, formatRoute } from "../model/route";
import { caller, events, guests, seriesOf, tick } from "../state";
import { Chart } from "../ui/Chart";
import { Throughput } from "../ui/Throughput";
import { Empty, StateBadge } from "../ui/parts";
import { Actions } from "./Actions";
import { EventLine } from "./Activity";

const Terminal = lazy(() => import("../ui/Terminal"));

export function Guest({ name, tab }: { name: string; tab: Tab }): JSX.Element {
  const guest = guests.value.get(name);
  if (!guest) {
    return (
      <main>
        <Empty>
          There is no guest {name}. <a href="#/">All guests</a>
        </Empty>
      </main>
    );
  }
  return (
    <main class="guest">
      <div class="guest-head">
        <h1>{guest.name}</h1>
        <StateBadge guest={guest} />
        <span class="faint">{summary(guest)}</span>
        <span class="spacer" />
        <Actions guest={guest} />
      </div>
      {guest.reason && guest.state !== "running" && <p class="reason">{guest.reason}</p>}
      <div class="tabs" role="tablist">
        {TABS.map((each, at) => (
          <a
            key={each}
            role="tab"
            aria-selected={each === tab}
            href={formatRoute({ page: "guest", name, tab: each })}
            title={`${at + 1}`}
          >
            {each[0]?.toUpperCase()}
            {each.slice(1)}
          </a>
        ))}
      </div>
      {tab === "charts" && <Charts guest={guest} />}
      {tab === "console" && <ConsoleTab guest={guest} />}
      {tab === "log" && <LogTab guest={guest} />}
      {tab === "details" && <Details guest={guest} />}
    </main>
  );
}

const summary = (guest: GuestView): string =>
  [
    guest.image,
    `${guest.cpus} CPU${guest.cpus === 1 ? "" : "s"}`,
    bytes(guest.memory_bytes),
    guest.accelerator,
    guest.ports.join(" "),
    guest.pid !== null && guest.created !== null ? `up ${duration(Date.now() / 1000 - guest.created)}` : null,
  ]
    .filter(Boolean)
    .join(" · ");

function Charts({ guest }: { guest: GuestView }): JSX.Element {
  void tick.value;
  const series = seriesOf(guest.name);
  const its = events.value.filter((event) => event.guest === guest.name).slice(-12);
  return (
    <>
      <div class="charts two">
        <Chart
          title="CPU"
          series={series}
          stack
          least={guest.cpus}
          format={cpus}
          lines={[
            { quantity: "run", label: "run", colour: "blue" },
            { quantity: "other", label: "devices", colour: "teal" },
            { quantity: "wait", label: "wait (steal)", colour: "red" },
          ]}
        />
        <Chart
          title="Memory"
          series={series}
          least={guest.memory_bytes}
          format={bytes}
        binary
          lines={[{ quantity: "memory", label: `of ${bytes(guest.memory_bytes)}`, colour: "teal" }]}
        />
        <Throughput series={series} />
      </div>
      <section class="panel">
        <header>
          <h2>Lately</h2>
        </header>
        {its.length === 0 ? (
          <Empty>Nothing has happened to it since the service began to listen.</Empty>
        ) : (
          <ol class="events">
            {its.reverse().map((event) => (
              <EventLine key={event.id} event={event} />
            ))}
          </ol>
        )}
      </section>
    </>
  );
}

function ConsoleTab({ guest }: { guest: GuestView }): JSX.Element {
  if (!allows(caller.value?.role ?? "viewer", "operator")) return <Empty>The console needs the role operator.</Empty>;
  if (guest.pid === null) return <Empty>{guest.name} does not run.</Empty>;
  return (
    <Suspense fallback={<Empty>…</Empty>}>
      {/* Another process is another console. */}
      <Terminal key={guest.pid} name={guest.name} readOnly={false} />
    </Suspense>
  );
}

const LOG_LINES = 1000;
const LOG_REFRESH_MS = 2000;

function LogTab({ guest }: { guest: GuestView }): JSX.Element {
  const [source, setSource] = useState<Logs["source"]>("console");
  const [text, setText] = useState<string | null>(null);
  useEffect(() => {
    let gone = false;
    const load = (): void => {
      get<Logs>(guestPath(guest.name, `/logs?source=${source}&tail=${LOG_LINES}`)).then(
        (logs) => !gone && setText(plain(logs.text)),
        (error: unknown) => {
          if (!gone && text === null) complain(error);
        },
      );
    };
    load();
    const timer = guest.pid === null ? undefined : setInterval(load, LOG_REFRESH_MS);
    return () => {
      gone = true;
      clearInterval(timer);
    };
  }, [guest.name, guest.pid, source]);
  return (
    <div class="log">
      <div class="log-bar">
        {(["console", "command"] as const).map((each) => (
          <button key={each} class={each === source ? "here" : ""} onClick={() => (setText(null), setSource(each))}>
            {each}
          </button>
        ))}
        <small>last {LOG_LINES} lines</small>
      </div>
      <pre tabIndex={0}>{text === null ? "…" : text || "It has said nothing."}</pre>
    </div>
  );
}

/** Without the terminal's control sequences. */
const plain = (text: string): string =>
  // eslint-disable-next-line no-control-regex
  text.replace(/\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][0-9A-B]|\x1b[=>78cM]|\r/g, "");

function Details({ guest }: { guest: GuestView }): JSX.Element {
  const [detail, setDetail] = useState<GuestDetail | null>(null);
  useEffect(() => {
    let gone = false;
    get<GuestDetail>(guestPath(guest.name)).then((found) => !gone && setDetail(found), complain);
    return () => {
      gone = true;
    };
  }, [guest.name, guest.state]);
  const rows: [string, string][] = [
    ["Started", dateTime(guest.created)],
    ["Process", guest.pid === null ? "–" : String(guest.pid)],
    ["Accelerator", guest.accelerator ?? "–"],
    ["Starts with the host", guest.autostart ? "yes" : "no"],
    ["Needs", guest.depends_on.join(", ") || "–"],
    ["Restarts", String(guest.restarts)],
    ["Exit status", guest.status === null ? "–" : String(guest.status)],
    ["Command", guest.command.join(" ") || "–"],
  ];
  return (
    <div class="details">
      <dl>
        {rows.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
      <div class="columns">
        <Json title="Definition" value={detail?.definition ?? null} />
        <Json title="What its process says" value={detail?.facts ?? null} />
      </div>
    </div>
  );
}

function Json({ title, value }: { title: string; value: unknown }): JSX.Element {
  return (
    <section class="panel">
      <header>
        <h2>{title}</h2>
      </header>
      <pre tabIndex={0}>{value === null ? "–" : JSON.stringify(value, null, 2)}</pre>
    </section>
  );
}
