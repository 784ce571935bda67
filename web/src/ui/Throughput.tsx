/* What goes through a host's or a guest's disks and networks, as two charts. */
import type { JSX } from "preact";
import { rate } from "../model/format";
import type { Series } from "../model/series";
import { Chart } from "./Chart";

export function Throughput({ series }: { series: Series }): JSX.Element {
  return (
    <>
      <Chart
        title="Disk"
        series={series}
        format={rate}
        binary
        least={100_000}
        lines={[
          { quantity: "diskRead", label: "read", colour: "blue" },
          { quantity: "diskWritten", label: "written", colour: "orange" },
        ]}
      />
      <Chart
        title="Network"
        series={series}
        format={rate}
        binary
        least={10_000}
        lines={[
          { quantity: "netReceived", label: "in", colour: "blue" },
          { quantity: "netSent", label: "out", colour: "orange" },
        ]}
      />
    </>
  );
}
