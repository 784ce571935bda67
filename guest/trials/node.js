// Programs that V8 compiles, compiles again, and throws away: every result is computed in two ways.
"use strict";
const crypto = require("crypto");
const zlib = require("zlib");

function check(what, got, wanted) {
  if (got !== wanted) {
    console.error(`${what}: ${got}, expected ${wanted}`);
    process.exit(1);
  }
  console.log("passed", what);
}

// Hot integer code, then the same function with another type: it is optimised, deoptimised and optimised anew.
function mix(a, n) {
  for (let i = 0; i < n; i++) a = (Math.imul(a, 1103515245) + 12345) | 0;
  return a;
}
let slow = 1n;
for (let i = 0; i < 20000; i++) slow = BigInt.asIntN(32, slow * 1103515245n + 12345n);
check("integers", mix(1, 20000), Number(slow));
function add(a, b) { return a + b; }
let sum = 0;
for (let i = 0; i < 300000; i++) sum = add(sum, i);
let text = "";
for (let i = 0; i < 1000; i++) text = add(text, "x");
for (let i = 0; i < 300000; i++) sum = add(sum, 0.5);
check("deoptimisation", sum + text.length, 299999 * 150000 + 150000 + 1000);

// Many functions made at run time.
let made = 0;
for (let i = 0; i < 2000; i++) made += new Function("x", `let s = 0; for (let k = 0; k < 50; k++) s += x + ${i}; return s;`)(i);
check("new functions", made, 2000 * 1999 * 50);

// WebAssembly: (func (param i32) (result i32) loop) computing the sum below n.
const code = Uint8Array.from([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 115, 0, 0, 10, 35, 1, 33, 1, 1, 127,
  2, 64, 3, 64, 32, 0, 69, 13, 1, 32, 0, 65, 1, 107, 33, 0, 32, 1, 32, 0, 106, 33, 1, 12, 0, 11, 11, 32, 1, 11,
]);
code[28] = code.length - 29; // sizes of section and body
code[30] = code.length - 31;
const wasm = new WebAssembly.Instance(new WebAssembly.Module(code)).exports;
for (let i = 0; i < 50; i++) check.last = wasm.s(50000 + i);
check("wasm", check.last, (50049 * 50048 / 2) | 0);

const numbers = new Float64Array(100000).map((_, i) => Math.sin(i) * 1e6);
const sorted = Float64Array.from(numbers).sort();
let ordered = true;
for (let i = 1; i < sorted.length; i++) ordered = ordered && sorted[i - 1] <= sorted[i];
check("sort", ordered, true);
const data = crypto.createHash("sha512").update("abc").digest("hex").slice(0, 16);
check("sha512", data, "ddaf35a193617aba");
const blob = Buffer.alloc(300000, "some text that repeats, with ");
check("zlib", zlib.inflateSync(zlib.deflateSync(blob)).equals(blob), true);
check("regexp", "ab12cd345".repeat(3000).match(/[a-z]+(\d+)/g).length, 6000);
const objects = [];
for (let round = 0; round < 30; round++) for (let i = 0; i < 20000; i++) objects[i] = { i, next: objects[i - 1], s: "k" + i };
check("garbage", objects[19999].next.next.i, 19997);
