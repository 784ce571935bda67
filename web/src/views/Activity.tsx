// Jobs and events: what the service does and what has happened.
import type { JSX } from "preact";
import { post } from "../api/client";
import type { EventView, JobView } from "../api/types";
import { attempt } from "../commands";
import { allows } from "../model/actions";
import { clock, dateTime, duration } from "../model/format";
import { caller, events, jobs, tick } from "../state";
import { Empty } from "../ui/parts";

export function Activity(): JSX.Element {
  const sorted = [...jobs.value.values()].sort((a, b) => b.created - a.created);
  return (
    <main class="activity">
      <section class="panel">
        <header>
          <h2>Jobs</h2>
        </header>
        {sorted.length === 0 ? (
          <Empty>No jobs yet.</Empty>
        ) : (
          <table>
            <thead>
              <tr>
                <th>Job</th>
                <th>Guest</th>
                <th>State</th>
                <th class="wide">What</th>
                <th class="wide">By</th>
                <th class="number">Took</th>
              </tr>
            </thead>
            <tbody>
              {sorted.slice(0, 100).map((job) => (
                <tr key={job.id}>
                  <td title={`${job.id}, ${dateTime(job.created)}`}>{job.kind}</td>
                  <td>{job.guest ? <a href={`#/guest/${encodeURIComponent(job.guest)}/charts`}>{job.guest}</a> : "–"}</td>
                  <td>
                    <JobState job={job} />
                  </td>
                  <td class="wide faint">{job.problem?.message ?? job.message}</td>
                  <td class="wide faint">{job.by}</td>
                  <td class="number">{job.started === null ? "–" : took(job)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        )}
      </section>
      <section class="panel">
        <header>
          <h2>Events</h2>
        </header>
        <ol class="events">
          {[...events.value].reverse().map((event) => (
            <EventLine key={event.id} event={event} />
          ))}
        </ol>
      </section>
    </main>
  );
}

const took = (job: JobView): string => {
  const seconds = (job.ended ?? Date.now() / 1000) - (job.started ?? job.created);
  return seconds < 10 ? `${seconds.toFixed(1)} s` : duration(seconds);
};

function JobState({ job }: { job: JobView }): JSX.Element {
  const tones = { queued: "busy", running: "busy", done: "good", failed: "bad", cancelled: "idle", interrupted: "warn" };
  return (
    <span class={`state ${tones[job.state]}`}>
      <i aria-hidden="true" />
      {job.state}
    </span>
  );
}

export function EventLine({ event }: { event: EventView }): JSX.Element {
  return (
    <li>
      <time title={dateTime(event.time)}>{clock(event.time)}</time>
      <b>{event.guest ?? "host"}</b>
      <span>{eventText(event)}</span>
    </li>
  );
}

export function eventText(event: EventView): string {
  const { data } = event;
  const word = (name: string): string => (typeof data[name] === "string" ? (data[name] as string) : "");
  if (event.kind === "guest") {
    if (data["removed"] === true) return "is gone";
    const ready = data["state"] === "running" ? (data["ready"] === true ? ", ready" : ", booting") : "";
    return [`${word("state")}${ready}`, word("reason")].filter(Boolean).join(": ");
  }
  if (event.kind === "job") {
    const problem = data["problem"] as { message?: string } | null;
    const said = problem?.message ?? (data["state"] === "running" ? word("message") : "");
    return [`${word("kind")} ${word("state")}`, said].filter(Boolean).join(": ");
  }
  const said = word("what") || word("message") || pairs(data);
  return [event.kind.replace(/^guest\./, ""), said].filter(Boolean).join(": ");
}

const pairs = (data: Record<string, unknown>): string =>
  Object.entries(data)
    .filter(([name, value]) => name !== "time" && (typeof value === "string" || typeof value === "number"))
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${typeof value === "number" ? Number(value.toFixed(3)) : String(value)}`)
    .join(", ");

const FADE_MS = 8000;

/** Running jobs, and those that have just ended, in a corner of every page. */
export function JobCards(): JSX.Element {
  void tick.value;
  const now = Date.now() / 1000;
  const shown = [...jobs.value.values()]
    .filter((job) => job.ended === null || now - job.ended < FADE_MS / 1000 || (job.state === "failed" && now - job.ended < 30))
    .sort((a, b) => b.created - a.created)
    .slice(0, 5);
  const mayCancel = allows(caller.value?.role ?? "viewer", "operator");
  return (
    <div class="cards" aria-live="polite">
      {shown.map((job) => (
        <div key={job.id} class={`card job ${job.state}`} data-job={job.kind} data-state={job.state}>
          <div>
            <b>
              {job.kind} {job.guest}
            </b>
            <span class="spacer" />
            {job.ended === null && mayCancel && (
              <button class="plain" onClick={() => attempt(() => post(`/v1/jobs/${encodeURIComponent(job.id)}/cancel`))}>
                Cancel
              </button>
            )}
            {job.ended !== null && <span>{job.state}</span>}
          </div>
          {job.ended === null && (job.progress === null ? <progress /> : <progress max={1} value={job.progress} />)}
          <small>{job.problem?.message ?? (job.state === "done" ? `took ${took(job)}` : job.message)}</small>
        </div>
      ))}
    </div>
  );
}
