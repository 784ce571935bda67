// Figures as people read them. A missing one is an en dash, everywhere.
const NONE = "–";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"] as const;

export function bytes(count: number | null | undefined): string {
  if (count === null || count === undefined || !Number.isFinite(count)) return NONE;
  let value = Math.max(0, count);
  let unit = 0;
  while (value >= 1000 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${trimmed(value.toFixed(digits))} ${UNITS[unit] ?? ""}`;
}

export const rate = (perSecond: number | null | undefined): string =>
  perSecond === null || perSecond === undefined ? NONE : `${bytes(perSecond)}/s`;

export const percent = (share: number | null | undefined): string =>
  share === null || share === undefined || !Number.isFinite(share) ? NONE : `${Math.round(share * 100)} %`;

/** CPUs kept busy: 0.37, 1.2, 14. */
export function cpus(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  return value.toFixed(value >= 10 ? 0 : value >= 1 ? 1 : 2);
}

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return NONE;
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
}

export function clock(secondsSince1970: number): string {
  const at = new Date(secondsSince1970 * 1000);
  return [at.getHours(), at.getMinutes(), at.getSeconds()].map((part) => String(part).padStart(2, "0")).join(":");
}

export function dateTime(secondsSince1970: number | null | undefined): string {
  if (secondsSince1970 === null || secondsSince1970 === undefined) return NONE;
  const at = new Date(secondsSince1970 * 1000);
  const day = [at.getFullYear(), at.getMonth() + 1, at.getDate()].map((part) => String(part).padStart(2, "0")).join("-");
  return `${day} ${clock(secondsSince1970)}`;
}

const trimmed = (text: string): string => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
