// What all interactive figures share. Functions that touch no page are tested on their own.
function plain(x, digits) { return x.toLocaleString('en', {minimumFractionDigits: digits || 0, maximumFractionDigits: digits || 0}); }
function list(words) { return words.length < 2 ? words.join('') : words.slice(0, -1).join(', ') + ' and ' + words[words.length - 1]; }
function runs(numbers) {                                     // 1, 2, 3, 7 -> [[1, 3], [7, 7]]
  const out = [];
  for (const n of numbers) { const last = out[out.length - 1]; if (last && last[1] === n - 1) last[1] = n; else out.push([n, n]); }
  return out;
}
function ranges(numbers) { return list(runs(numbers).map(([a, b]) => a === b ? '' + a : b === a + 1 ? a + ', ' + b : a + ' to ' + b)); }
function scale(low, high, from, to) { return x => from + (x - low)/(high - low)*(to - from); }
function ticks(low, high, n) {                               // round numbers from low to high, about n of them
  const rough = (high - low)/n, power = Math.pow(10, Math.floor(Math.log10(rough))), step = [1, 2, 5, 10].map(k => k*power).find(s => s >= rough), out = [];
  for (let t = Math.ceil(low/step - 1e-9)*step; t <= high + step*1e-6; t += step) out.push(+t.toPrecision(6));
  return out;
}
function whenThere(id, then, tries) {                        // a notebook may run the script before it shows the figure
  const root = document.getElementById(id);
  if (root) then(root); else if (tries !== 0) setTimeout(whenThere, 100, id, then, (tries || 50) - 1);
}
function control(root, name) { return root.querySelector('[name="' + name + '"]'); }
function say(root, words) { root.querySelector('output').textContent = words; }
function told(slider, words) { slider.setAttribute('aria-valuetext', words); slider.parentNode.querySelector('.pb-value').textContent = words; }
function add(parent, tag, attributes, text) {                // a new SVG element
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  return parent.appendChild(e);
}
function canvas(root, width, height) {                       // the drawing, emptied
  const svg = root.querySelector('svg');
  svg.setAttribute('viewBox', '0 0 ' + width + ' ' + height);
  svg.replaceChildren();
  return svg;
}
function axis(svg, at, low, high, values, vertical, name, show) {   // values with ticks; at() maps a value to its place
  const ink = {stroke: 'currentColor', 'stroke-opacity': .6};
  if (vertical) add(svg, 'line', {x1: low, x2: low, y1: at(values[0]), y2: at(values[values.length - 1]), ...ink});
  for (const v of values) {
    if (vertical) { add(svg, 'line', {x1: low - 4, x2: low, y1: at(v), y2: at(v), ...ink}); add(svg, 'text', {x: low - 7, y: at(v) + 4, 'text-anchor': 'end'}, show(v)); }
    else { add(svg, 'line', {x1: at(v), x2: at(v), y1: low, y2: low + 4, ...ink}); add(svg, 'text', {x: at(v), y: low + 18, 'text-anchor': 'middle'}, show(v)); }
  }
  if (!vertical) add(svg, 'line', {x1: at(values[0]), x2: at(values[values.length - 1]), y1: low, y2: low, ...ink});
  if (vertical) add(svg, 'text', {x: 2, y: high, 'text-anchor': 'start'}, name);
  else add(svg, 'text', {x: (at(values[0]) + at(values[values.length - 1]))/2, y: low + 36, 'text-anchor': 'middle'}, name);
}
