"""The looks of a report: one column on a phone, two on a screen; light, dark and on paper."""

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #5c6675; --rule: #dde1e7;
  --accepted: #4e90c4; --late: #f09128; --rejected: #b02496; --data: #9a7b5f; --send: #8a6bb8;
  --wait: #c6ccd5; --reduce: #0f8a6a; --update: #4fb286; --publish: #a5dcb8; --none: #eceff3;
  --r0: #0072b2; --r1: #d55e00; --r2: #009e73; --r3: #b8579a; --r4: #b58400; --r5: #4b6cb7;
  --warn: #fff4d6; --warn-rule: #d9a400;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #12161c; --card: #1b2129; --ink: #e4e8ee; --soft: #9aa5b4; --rule: #323b47;
    --wait: #4a5462; --none: #262d37; --data: #b2937a; --send: #a389d0;
    --r0: #5aaee6; --r1: #f28b50; --r2: #3cc79c; --r3: #e093c5; --r4: #e8b93e; --r5: #93aef0;
    --warn: #3a3014; --warn-rule: #d9a400;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 20px 16px 40px; max-width: 1180px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 22px; margin: 0 0 12px; }
h2 { font-size: 17px; margin: 26px 0 10px; }
h3 { font-size: 14px; margin: 0 0 2px; }
p { margin: 0 0 6px; }
.soft, figcaption { color: var(--soft); font-size: 13px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px; min-width: 0; }
.card + .card { margin-top: 12px; } .card + .grid { margin-top: 12px; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.grid > .card { margin: 0; }
.grid.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.tiles { display: grid; gap: 10px 14px; margin: 0; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(min(46%, 165px), 1fr)); }
.tiles dt { color: var(--soft); font-size: 13px; line-height: 1.3; } .tiles dd { margin: 0; font-weight: 600; }
.notice { background: var(--warn); border-left: 4px solid var(--warn-rule); padding: 8px 12px; margin: 0 0 10px; }
.tag { border-radius: 4px; padding: 0 6px; font-weight: 600; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, "DejaVu Sans", sans-serif; }
svg text { fill: var(--soft); } .mid { text-anchor: middle; } .end { text-anchor: end; }
svg .grid { stroke: var(--rule); fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: currentColor; opacity: .16; } .dot { fill: currentColor; }
.r0 { color: var(--r0); } .r1 { color: var(--r1); } .r2 { color: var(--r2); }
.r3 { color: var(--r3); } .r4 { color: var(--r4); } .r5 { color: var(--r5); }
.tag.r0 { background: var(--r0); } .tag.r1 { background: var(--r1); } .tag.r2 { background: var(--r2); }
.tag.r3 { background: var(--r3); } .tag.r4 { background: var(--r4); } .tag.r5 { background: var(--r5); }
.tag[class] { color: #fff; }
@media (prefers-color-scheme: dark) { .tag[class] { color: #12161c; } }
.accepted, .compute { fill: var(--accepted); background: var(--accepted); }
.late, .discarded { fill: var(--late); background: var(--late); }
.rejected { fill: var(--rejected); background: var(--rejected); }
.data { fill: var(--data); background: var(--data); } .send { fill: var(--send); background: var(--send); }
.wait { fill: var(--wait); background: var(--wait); } .none { fill: var(--none); background: var(--none); }
.reduce { fill: var(--reduce); background: var(--reduce); }
.update { fill: var(--update); background: var(--update); }
.publish { fill: var(--publish); background: var(--publish); }
.key { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin: 6px 0 0; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.plot { display: grid; grid-template-columns: auto 1fr; column-gap: 6px; font-size: 12px; color: var(--soft); }
.rows { position: relative; min-width: 3.2em; }
.rows span { position: absolute; right: 0; transform: translateY(-50%); white-space: nowrap; }
.area { background: var(--none); min-width: 0; }
.area img, .area svg { display: block; width: 100%; height: 100%; }
.under { grid-column: 2; display: flex; justify-content: space-between; }
.ramp { display: inline-block; width: 90px; height: 10px; border-radius: 2px; vertical-align: -1px;
  background: linear-gradient(90deg, #2c7bb6, #7cbedb, #ffeca0, #fda054, #ce1b28); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; overflow-wrap: normal; }
table { font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; } thead th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.facts td, td.text { overflow-wrap: anywhere; } td.text { min-width: 5em; }
th.left, td.left, .facts td { text-align: left; }
.facts td:first-child { color: var(--soft); min-width: 7.2em; padding-right: 10px; }
td span { color: var(--soft); display: inline-block; min-width: 3.6em; }
td.part { text-align: left; min-width: 84px; width: 35%; } .few { opacity: .35; }
td.part i { display: block; height: 6px; border-radius: 2px; }
details { margin-top: 10px; } .card > details:first-child { margin-top: 0; }
summary { cursor: pointer; color: var(--soft); }
@media (min-width: 760px) { svg { font-size: 8px; } }
@media (max-width: 480px) {
  body { padding: 14px 10px 30px; font-size: 15px; } .card { padding: 12px 10px; }
  th, td { padding: 4px 5px; } thead th { white-space: normal; } td.part { min-width: 60px; }
}
@media print {
  :root {
    color-scheme: light; --ground: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #bbb;
    --wait: #c6ccd5; --none: #eceff3;
    --r0: #0072b2; --r1: #d55e00; --r2: #009e73; --r3: #b8579a; --r4: #b58400; --r5: #4b6cb7;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0 1px; font-size: 11px; } svg { font-size: 10px; }
  .grid[class] { grid-template-columns: repeat(2, minmax(0, 1fr)); } .grid > .card:only-child { grid-column: 1 / -1; }
  h1 { font-size: 16px; } h2 { font-size: 13px; margin: 14px 0 6px; } h3 { font-size: 12px; }
  .card { padding: 8px; } table { font-size: 10.5px; }
  .soft, figcaption, .key, .plot, .tiles dt { font-size: 10px; } td, th { padding: 2px 6px; }
  .wide { overflow: visible; } thead th { white-space: normal; } td.part { min-width: 50px; }
  .card, figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .tag[class] { color: #fff; }
}
"""
