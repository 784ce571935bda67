// Small parts that many views use.
import type { ComponentChildren, JSX } from "preact";
import type { GuestView } from "../api/types";
import { stateText, tone } from "../model/actions";

export function StateBadge({ guest }: { guest: GuestView }): JSX.Element {
  return (
    <span class={`state ${tone(guest)}`} title={guest.reason ?? ""}>
      <i aria-hidden="true" />
      {stateText(guest)}
    </span>
  );
}

export function Meter({ share, text, tone = "" }: { share: number; text: string; tone?: string }): JSX.Element {
  // A progress element is drawn without inline styles.
  return (
    <span class={`meter ${tone}`}>
      <progress max={1} value={Math.min(1, Math.max(0, share))} aria-hidden="true" />
      <span>{text}</span>
    </span>
  );
}

export function Sparkline({ values, max }: { values: number[]; max: number }): JSX.Element {
  const width = 96;
  const height = 20;
  const shown = values.slice(-60);
  const step = width / 59;
  const left = width - (shown.length - 1) * step;
  const y = (value: number): number => height - 1 - (Math.min(value, max) / (max || 1)) * (height - 2);
  const line = shown.map((value, at) => `${(left + at * step).toFixed(1)},${y(value).toFixed(1)}`);
  return (
    <svg class="spark" viewBox={`0 0 ${width} ${height}`} preserveAspectRatio="none" aria-hidden="true">
      {shown.length > 1 && (
        <>
          <polygon points={`${left.toFixed(1)},${height} ${line.join(" ")} ${width},${height}`} />
          <polyline points={line.join(" ")} />
        </>
      )}
    </svg>
  );
}

export function Panel(props: { title: ComponentChildren; aside?: ComponentChildren; children: ComponentChildren; class?: string }): JSX.Element {
  return (
    <section class={`panel ${props.class ?? ""}`}>
      <header>
        <h2>{props.title}</h2>
        <div class="aside">{props.aside}</div>
      </header>
      {props.children}
    </section>
  );
}

export function Empty({ children }: { children: ComponentChildren }): JSX.Element {
  return <p class="empty">{children}</p>;
}

export const Key = ({ children }: { children: ComponentChildren }): JSX.Element => <kbd>{children}</kbd>;
