// uPlot in the page's colours, as wide as its place; drawn anew with each sample.
import type { JSX } from "preact";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { clock } from "../model/format";
import { type Quantity, type Series, WINDOW_S, stacked } from "../model/series";
import { tick } from "../state";
import { themeCount } from "./theme";

export interface Line {
  quantity: Quantity;
  label: string;
  colour: string;
}

export interface ChartProps {
  title: string;
  series: Series;
  lines: readonly Line[];
  format: (value: number) => string;
  /** Areas on top of one another. */
  stack?: boolean;
  /** The axis reaches at least this far. */
  least?: number;
  /** Bytes, or bytes a second. */
  binary?: boolean;
}

const HEIGHT = 132;
const MIN_WINDOW_S = 60;
/** Steps of an axis of bytes: powers of two, so that its labels are round. */
const BINARY_STEPS = Array.from({ length: 44 }, (_, power) => 2 ** power);

export function Chart(props: ChartProps): JSX.Element {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot>();
  const count = tick.value;
  const theme = themeCount.value;

  useEffect(() => {
    const element = place.current;
    if (!element) return;
    const drawn = new uPlot(options(props, element.clientWidth), data(props), element);
    plot.current = drawn;
    const watcher = new ResizeObserver(() => drawn.setSize({ width: element.clientWidth, height: HEIGHT }));
    watcher.observe(element);
    return () => {
      watcher.disconnect();
      drawn.destroy();
    };
  }, [props.series, theme]);

  useEffect(() => plot.current?.setData(data(props)), [count, props.series]);

  const last = props.series.last;
  return (
    <figure class="chart" data-points={props.series.length}>
      <figcaption>
        <b>{props.title}</b>
        {props.lines.map((line) => (
          <span key={line.quantity} class={`legend ${line.colour}`}>
            <i aria-hidden="true" />
            {line.label} <output>{last ? props.format(last[line.quantity]) : "–"}</output>
          </span>
        ))}
      </figcaption>
      <div ref={place} />
    </figure>
  );
}

function data(props: ChartProps): uPlot.AlignedData {
  const layers = props.lines.map((line) => props.series.values(line.quantity));
  // The top of the pile is drawn first, so that those below stay visible.
  const drawn = props.stack ? stacked(layers).reverse() : layers;
  return [props.series.times(), ...drawn] as uPlot.AlignedData;
}

function options(props: ChartProps, width: number): uPlot.Options {
  const style = getComputedStyle(document.documentElement);
  const colour = (name: string): string => style.getPropertyValue(`--${name}`).trim();
  const lines = props.stack ? [...props.lines].reverse() : props.lines;
  const font = `11px ${style.getPropertyValue("--font").trim()}`;
  const axis: uPlot.Axis = {
    stroke: colour("faint"),
    font,
    grid: { stroke: colour("line"), width: 1 },
    ticks: { show: false },
  };
  return {
    width,
    height: HEIGHT,
    pxAlign: 0,
    padding: [8, 6, 0, 0],
    legend: { show: false },
    // Of a pile, each area reaches down to the one below.
    bands: props.stack ? lines.slice(1).map((_, at) => ({ series: [at + 1, at + 2] as [number, number] })) : [],
    cursor: { y: false, points: { show: false } },
    scales: {
      x: {
        time: true,
        range: (_plot, min, max) => {
          const end = max ?? Date.now() / 1000;
          return [end - Math.min(WINDOW_S, Math.max(MIN_WINDOW_S, end - (min ?? end))), end];
        },
      },
      y: { range: (_plot, _min, max) => [0, Math.max(props.least ?? 0, (max ?? 0) * 1.12) || 1] },
    },
    axes: [
      { ...axis, size: 22, space: 64, values: (_plot, splits) => splits.map((at) => clock(at)) },
      {
        ...axis,
        size: 62,
        space: 28,
        ...(props.binary ? { incrs: BINARY_STEPS } : {}),
        values: (_plot, splits) => splits.map((value) => props.format(value)),
      },
    ],
    series: [
      {},
      ...lines.map((line) => ({
        label: line.label,
        stroke: colour(line.colour),
        fill: `${colour(line.colour)}${props.stack ? "55" : "1c"}`,
        width: 1.4,
        points: { show: false },
      })),
    ],
  };
}
