import { defineConfig } from "vitest/config";

// The host's service answers with a strict content security policy: nothing inline, nothing from elsewhere.
export default defineConfig({
  base: "/",
  esbuild: { jsx: "automatic", jsxImportSource: "preact", legalComments: "none" },
  build: {
    outDir: "../src/ostler/api/static",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
    reportCompressedSize: false,
  },
  server: { proxy: { "/v1": { target: "http://127.0.0.1:8006", ws: true } } },
  test: { include: ["test/**/*.test.ts"], environment: "node" },
});
