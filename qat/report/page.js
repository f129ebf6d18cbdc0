"use strict";
// What a reader chooses: a layer whose amax is drawn beside what its scale was made for, and two runs to compare.

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [340, 230, 44, 52, 32, 40]; // as the heat maps above it

function number(value) {
  const short = Number(value.toPrecision(3));
  return short !== 0 && Math.abs(short) < 1e-3 ? short.toExponential().replace("-", "−") : String(short);
}

/** Round numbers from 0 to `end`, about `count` of them. */
function ticks(end, count) {
  const unit = 10 ** Math.floor(Math.log10(end / count));
  const gap = [1, 2, 5, 10].find((each) => each * unit >= end / count) * unit;
  return Array.from({ length: Math.floor(end / gap) + 1 }, (_, i) => i * gap);
}

/** One role of one layer as SVG: `amax` and `predicted`, a number or null for each of `steps`. */
function history(title, steps, amax, predicted, last) {
  const top = 1.08 * Math.max(...amax, ...predicted) || 1;
  const x = (step) => LEFT + ((step - 0.5) / last) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
  const point = (values) => (step, i) => (values[i] === null ? [] : [[x(step), y(values[i])]]);
  const line = (values, style) => {
    const path = steps.flatMap(point(values)).map((at) => at.map((v) => v.toFixed(1)).join(" ")).join("L");
    return path && `<path d="M${path}" fill="none" style="${style}"/>`;
  };
  const beyond = steps.filter((_, i) => amax[i] > predicted[i] && predicted[i] !== null);
  const dots = (chosen, colour) =>
    chosen.map((s) => `<circle cx="${x(s)}" cy="${y(amax[steps.indexOf(s)])}" r="2.4" fill="var(--${colour})"/>`);
  const text = (at, words, more) => `<text x="${at[0]}" y="${at[1]}" fill="var(--muted)" ${more}>${words}</text>`;
  const across = ticks(last, 5).filter((t) => t >= 1 && t % 1 === 0);
  return `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" style="max-width: ${WIDTH * 1.35}px; font-size: 10.5px" role="img"
    aria-label="${title}: amax and predicted amax">
    <text x="${LEFT}" y="17" fill="var(--ink)" style="font-size: 11px; font-weight: bold">${title}</text>
    ${ticks(top, 4).map((t) => `<path d="M${LEFT} ${y(t)}H${WIDTH - RIGHT}" style="stroke: var(--rule); stroke-width: 0.7"/>
      ${text([LEFT - 5, y(t) + 3.5], number(t), 'text-anchor="end"')}`).join("")}
    ${across.map((t) => text([x(t), HEIGHT - BOTTOM + 14], t, 'text-anchor="middle"')).join("")}
    ${text([(LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8], "Optimizer step", 'text-anchor="middle"')}
    ${line(predicted, "stroke: var(--base); stroke-width: 3.2")}${line(amax, "stroke: var(--accent); stroke-width: 1.6")}
    ${dots(steps.length > 40 ? [] : steps.filter((_, i) => amax[i] !== null), "accent").join("")}
    ${dots(beyond, "warm").join("")}</svg>`;
}

for (const figure of document.querySelectorAll(".amax")) {
  const { steps, last, layers } = JSON.parse(figure.querySelector("script").textContent);
  const select = figure.querySelector("select");
  const draw = () => {
    figure.querySelector(".panels").innerHTML = Object.entries(layers[select.value])
      .map(([role, lines]) => history(role[0].toUpperCase() + role.slice(1), steps, ...lines, last))
      .join("");
  };
  select.addEventListener("change", draw);
  draw();
}

{
  const table = document.querySelector("#differences table");
  const selects = [...document.querySelectorAll("#differences select")];
  const narrow = () => {
    const [a, b] = selects.map((each) => Number(each.value)); // a column; 0 stands for all
    for (const row of table?.rows ?? []) {
      const cells = [...row.cells];
      const pair = a && b;
      row.hidden = pair && row.parentNode.tagName === "TBODY" && cells[a].textContent === cells[b].textContent;
      cells.forEach((cell, i) => (cell.hidden = pair && i !== 0 && i !== a && i !== b));
    }
  };
  selects.forEach((each) => each.addEventListener("change", narrow));
}
