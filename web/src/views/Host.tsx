// The host at a glance: what it uses, what it has promised, and all its guests.
import { signal } from "@preact/signals";
import type { JSX } from "preact";
import { dialog, go } from "../commands";
import type { GuestView } from "../api/types";
import { allows } from "../model/actions";
import { bytes, cpus, duration, percent, rate } from "../model/format";
import { caller, guestList, host, hostSeries, jobs, latest, link, seriesOf, tick } from "../state";
import { Chart } from "../ui/Chart";
import { Throughput } from "../ui/Throughput";
import { Empty, Meter, Sparkline, StateBadge } from "../ui/parts";
import { Actions } from "./Actions";

export const filter = signal("");
export const selected = signal<string | null>(null);

export const shownGuests = (): GuestView[] => {
  const wanted = filter.value.trim().toLowerCase();
  return guestList.value.filter((guest) => `${guest.name} ${guest.state} ${guest.image ?? ""}`.toLowerCase().includes(wanted));
};

export function Host(): JSX.Element {
  return (
    <main>
      <Facts />
      <div class="charts four">
        <HostCharts />
      </div>
      <GuestTable />
    </main>
  );
}

function HostCharts(): JSX.Element {
  const now = latest.value?.host;
  const series = hostSeries.value;
  const count = now?.cpus ?? 1;
  return (
    <>
      <Chart
        title="CPU"
        series={series}
        stack
        least={count}
        format={cpus}
        lines={[
          { quantity: "run", label: "busy", colour: "blue" },
          { quantity: "wait", label: "steal", colour: "red" },
        ]}
      />
      <Chart
        title="Memory"
        series={series}
        least={now?.memory_bytes ?? 0}
        format={bytes}
        binary
        lines={[{ quantity: "memory", label: "used", colour: "teal" }]}
      />
      <Throughput series={series} />
    </>
  );
}

function Facts(): JSX.Element {
  const found = host.value;
  if (!found) return <p class="facts">…</p>;
  const { inventory, resources } = found;
  const usable = inventory.accelerators.filter((each) => each.usable).map((each) => each.name);
  return (
    <div class="facts">
      <span title={inventory.cpu.model}>{inventory.cpu.count} CPUs</span>
      <span title={inventory.accelerators.map((each) => `${each.name}: ${each.detail}`).join("\n")}>
        {usable.join(", ") || "no accelerator"}
      </span>
      <span>Linux {inventory.kernel}</span>
      <span>Ostler {found.version}</span>
      {Object.entries(resources)
        .filter(([, each]) => each.capacity > 0)
        .map(([name, each]) => (
          <span key={name} class="promise">
            {name === "cpu" ? "CPU" : name.replace("_", " ")} promised{" "}
            <Meter
              share={each.promised / each.capacity}
              tone={each.promised > each.capacity * 0.9 ? "warn" : ""}
              text={name === "cpu" ? `${cpus(each.promised / 1000)} of ${cpus(each.capacity / 1000)}` : `${bytes(each.promised)} of ${bytes(each.capacity)}`}
            />
          </span>
        ))}
    </div>
  );
}

function GuestTable(): JSX.Element {
  const shown = shownGuests();
  const all = guestList.value;
  const role = caller.value?.role ?? "viewer";
  return (
    <section class="panel guests">
      <header>
        <h2>
          Guests <small>{shown.length === all.length ? all.length : `${shown.length} of ${all.length}`}</small>
        </h2>
        <div class="aside">
          <input
            id="filter"
            type="search"
            placeholder="Filter  /"
            aria-label="Filter guests"
            value={filter.value}
            onInput={(event) => (filter.value = event.currentTarget.value)}
          />
          {allows(role, "admin") && (
            <button class="primary" onClick={() => (dialog.value = { kind: "define" })}>
              New guest
            </button>
          )}
        </div>
      </header>
      {shown.length === 0 ? (
        <Empty>
          {all.length
            ? "No guest matches."
            : link.value === "live"
              ? "No guests yet. Press c to define one."
              : "Waiting for the service…"}
        </Empty>
      ) : (
        <table>
          <thead>
            <tr>
              <th>Name</th>
              <th>State</th>
              <th class="wide">Image</th>
              <th>CPU</th>
              <th>Memory</th>
              <th class="wide number">Disk</th>
              <th class="wide number">Network</th>
              <th class="wide">Up</th>
              <th />
            </tr>
          </thead>
          <tbody>
            {shown.map((guest) => (
              <Row key={guest.name} guest={guest} />
            ))}
          </tbody>
        </table>
      )}
    </section>
  );
}

function Row({ guest }: { guest: GuestView }): JSX.Element {
  void tick.value;
  const alive = guest.pid !== null;
  const series = seriesOf(guest.name);
  const last = alive ? series.last : undefined;
  const job = guest.job === null ? undefined : jobs.value.get(guest.job);
  const at = selected.value === guest.name;
  const open = (): void => go({ page: "guest", name: guest.name, tab: "charts" });
  return (
    <tr class={at ? "selected" : ""} data-guest={guest.name} onClick={open}>
      <td class="name">
        <a href={`#/guest/${encodeURIComponent(guest.name)}/charts`}>{guest.name}</a>
        {!guest.defined && <small title="Started without the service">ad hoc</small>}
      </td>
      <td>
        <StateBadge guest={guest} />
        {job && <small class="doing">{job.progress === null ? job.kind : `${job.kind} ${percent(job.progress)}`}</small>}
        {(guest.state === "failed" || guest.state === "broken") && guest.reason && <small class="why">{guest.reason}</small>}
      </td>
      <td class="wide faint">{guest.image ?? "–"}</td>
      <td class="cpu">
        <Sparkline values={alive ? series.values("run") : []} max={guest.cpus} />
        <span>{last ? `${cpus(last.run)} / ${guest.cpus}` : `${guest.cpus}`}</span>
      </td>
      <td>
        {last ? (
          <Meter share={last.memory / guest.memory_bytes} text={`${bytes(last.memory)} / ${bytes(guest.memory_bytes)}`} />
        ) : (
          <span class="faint">{bytes(guest.memory_bytes)}</span>
        )}
      </td>
      <td class="wide number">{last ? rate(last.diskRead + last.diskWritten) : "–"}</td>
      <td class="wide number">{last ? rate(last.netReceived + last.netSent) : "–"}</td>
      <td class="wide faint">{alive && guest.created !== null ? duration(Date.now() / 1000 - guest.created) : "–"}</td>
      <td class="act" onClick={(event) => event.stopPropagation()}>
        <Actions guest={guest} only={["start", "stop"]} />
      </td>
    </tr>
  );
}
