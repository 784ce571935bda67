// A WebSocket that comes again after it was lost, more slowly each time, until it is closed here.
export interface StreamHandlers {
  path: () => string;
  onOpen?: () => void;
  onMessage: (data: string | ArrayBuffer) => void;
  /** Returns whether to come again. */
  onClose?: (code: number) => boolean;
}

export const FIRST_DELAY_MS = 500;
export const MAX_DELAY_MS = 15_000;

/** Half of the delay is chance, so that many browsers do not come back at once. */
export function backoffMs(attempt: number, chance: number): number {
  const full = Math.min(MAX_DELAY_MS, FIRST_DELAY_MS * 2 ** attempt);
  return full / 2 + (full / 2) * chance;
}

export class Stream {
  private socket: WebSocket | undefined;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private attempt = 0;
  private closed = false;

  constructor(private readonly handlers: StreamHandlers) {
    this.connect();
  }

  send(data: Uint8Array<ArrayBuffer>): void {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(data);
  }

  close(): void {
    this.closed = true;
    clearTimeout(this.timer);
    this.socket?.close();
  }

  private connect(): void {
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}${this.handlers.path()}`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => {
      this.attempt = 0;
      this.handlers.onOpen?.();
    };
    socket.onmessage = (event: MessageEvent<string | ArrayBuffer>) => {
      if (!this.closed) this.handlers.onMessage(event.data);
    };
    socket.onclose = (event) => {
      if (this.closed) return;
      if (this.handlers.onClose && !this.handlers.onClose(event.code)) return;
      this.timer = setTimeout(() => this.connect(), backoffMs(this.attempt++, Math.random()));
    };
  }
}
