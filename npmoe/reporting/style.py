"""The style sheet of the report: light and dark, from a phone's width to a wide screen."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b2330; --dim: #5a6675; --paper: #ffffff;
  --panel: #f4f6f9; --line: #d5dbe3; --accent: #b3261e; --note: #fff4d6; --plan: #8fb7dd;
  --plan2: #5b8fc4;
  --c0: #1f6fb4; --c1: #c8501e; --c2: #2b8a4b; --c3: #8a4bb0; --c4: #b8860b; --c5: #0f8b8d;
  --c6: #c2407f; --c7: #5d6470 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --dim: #a3adba; --paper: #12161c;
  --panel: #1b212a; --line: #38424f; --accent: #ff8a80; --note: #3a3216; --plan: #3f6f9f;
  --plan2: #2c5078;
  --c0: #6fb1ec; --c1: #f0905f; --c2: #6fcf8f; --c3: #c79be8; --c4: #e6c05a; --c5: #5ccfd1;
  --c6: #f08ab8; --c7: #b4bcc8 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 82rem; padding: 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .4rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem }
.dim { color: var(--dim); font-weight: 400 } p { margin: .4rem 0; max-width: 62rem }
.note { background: var(--note); border-left: 4px solid var(--accent); padding: .5rem .8rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0; padding: 0 } .tiles div { background: var(--panel); padding: .5rem .8rem;
  border-radius: 6px } .tiles dt { color: var(--dim); font-size: .85rem }
.tiles dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: .8rem } .grid3 { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)) }
figure { margin: 0; padding: .6rem; background: var(--panel); border-radius: 6px; min-width: 0 }
figcaption { font-weight: 600; margin-bottom: .3rem } .wide { margin-bottom: .6rem }
svg { display: block; width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif;
  fill: var(--dim) } .map svg { min-width: 30rem } .wide svg { min-width: 36rem }
.scroll { overflow-x: auto } .scroll:focus-visible { outline: 2px solid var(--c0) }
.grid { stroke: var(--line); stroke-width: 1 } .mark { stroke: var(--accent);
  stroke-dasharray: 2 3 } .curve { fill: none; stroke-width: 1.7; stroke-linejoin: round }
.even { fill: var(--plan) } .odd { fill: var(--plan2) } .edge { stroke: var(--paper);
  stroke-width: 1 } .hatch { stroke: var(--dim); stroke-width: 1.4 }
.keys { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .85rem; color: var(--dim) }
.keys i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
  border-radius: 2px; vertical-align: -.1rem } .keys .bar { width: 6rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { white-space: nowrap; padding: .25rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right }
th { color: var(--dim); font-weight: 600 } td:first-child, th:first-child { text-align: left }
.bad { color: var(--accent); font-weight: 600 } details { margin: .8rem 0 }
summary { cursor: pointer } img { max-width: 100%; background: #fff; border-radius: 4px }
@media print { body { max-width: none } figure { break-inside: avoid } }
"""
