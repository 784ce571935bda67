import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { del, get } from "../api/client";
import type { SnapshotList, SnapshotView } from "../api/types";
import { attempt, beginJob, complain, dialog } from "../commands";
import { allows } from "../model/actions";
import { bytes, dateTime } from "../model/format";
import { caller, jobs } from "../state";
import { Empty } from "../ui/parts";

export function Snapshots(): JSX.Element {
  const [found, setFound] = useState<SnapshotView[] | null>(null);
  const load = (): void => void get<SnapshotList>("/v1/snapshots").then((list) => setFound(list.snapshots), complain);
  // A snapshot more, or one that was replaced, follows a job.
  const done = [...jobs.value.values()].filter((job) => job.kind === "snapshot" && job.state === "done").length;
  useEffect(load, [done]);
  const may = allows(caller.value?.role ?? "viewer", "operator");

  const remove = (name: string): void => {
    dialog.value = {
      kind: "confirm",
      title: `Remove snapshot ${name}?`,
      text: "Guests that were restored from it run on.",
      verb: "Remove",
      run: async () => {
        await del(`/v1/snapshots/${encodeURIComponent(name)}`);
        load();
      },
    };
  };

  return (
    <main>
      <section class="panel">
        <header>
          <h2>
            Snapshots <small>{found?.length}</small>
          </h2>
        </header>
        {!found || found.length === 0 ? (
          <Empty>{found ? "None yet: a guest's page makes them (n)." : "…"}</Empty>
        ) : (
          <table>
            <thead>
              <tr>
                <th>Name</th>
                <th>Of</th>
                <th class="wide">Image</th>
                <th>Made</th>
                <th class="number">Memory</th>
                <th class="number wide">Disk</th>
                <th />
              </tr>
            </thead>
            <tbody>
              {found.map((each) => (
                <tr key={each.name} data-snapshot={each.name}>
                  <td class="name">
                    {each.name}
                    {each.error && <small class="why">{each.error}</small>}
                  </td>
                  <td>{each.guest ?? "–"}</td>
                  <td class="wide faint">{each.image ?? "–"}</td>
                  <td class="faint">{dateTime(each.created)}</td>
                  <td class="number">{bytes(each.memory_bytes)}</td>
                  <td class="number wide">{bytes(each.disk_bytes)}</td>
                  <td class="act">
                    {may && (
                      <span class="actions">
                        <button data-action="restore" onClick={() => attempt(() => beginJob(`/v1/snapshots/${encodeURIComponent(each.name)}/restore`))}>
                          Restore
                        </button>
                        <button class="danger" onClick={() => remove(each.name)}>
                          Remove
                        </button>
                      </span>
                    )}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        )}
      </section>
    </main>
  );
}
