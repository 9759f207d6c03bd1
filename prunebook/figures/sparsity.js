// Sparsity slider: measured points of one or more ways to prune, with the text they write.
function sparsityWords(data, way, i) {
  const p = data.ways[way][i], d = data.ways[way][0];
  if (!i) return 'The dense model: perplexity ' + plain(d.perplexity, 1) + ' ± ' + plain(d.stderr, 1) + ', ' + plain(d.parameters/1e6, 1) + ' million parameters.';
  return way[0].toUpperCase() + way.slice(1) + ', ' + plain(100*p.sparsity, 1) + ' % of the decoder removed: perplexity ' + plain(p.perplexity, 1) + ' ± ' + plain(p.stderr, 1) + ', ' +
    plain(p.perplexity/d.perplexity, 2) + ' times the dense one; ' + plain(p.parameters/1e6, 1) + ' of ' + plain(d.parameters/1e6, 1) + ' million parameters are left.';
}
function decades(low, high) {                                // 1, 2 or 5 times powers of ten, from below low to above high
  const all = [];
  for (let e = -3; e < 9; e++) for (const k of [1, 2, 5]) all.push(k*Math.pow(10, e));
  return all.slice(all.filter(v => v <= low).length - 1, all.filter(v => v < high).length + 1);
}
function mount(root, data) {
  const way = control(root, 'way'), point = control(root, 'point'), every = Object.values(data.ways).flat();
  const values = decades(Math.min(...every.map(p => p.perplexity - p.stderr)), Math.max(...every.map(p => p.perplexity + p.stderr)));
  const y = v => scale(Math.log(values[0]), Math.log(values[values.length - 1]), 225, 30)(Math.log(v));
  const x = scale(0, Math.max(...every.map(p => p.sparsity)), 60, 530), marks = ticks(0, Math.max(...every.map(p => p.sparsity)), 6);
  const texts = root.querySelectorAll('.pb-text');
  function update() {
    const line = data.ways[way.value], i = Math.min(+point.value, line.length - 1), svg = canvas(root, 560, 280);
    axis(svg, y, 60, 16, values, true, 'perplexity (log scale)', v => plain(v, v < 1 ? 2 : 0));
    axis(svg, x, 235, 0, marks, false, 'share of the decoder removed', v => plain(100*v) + ' %');
    for (const name in data.ways) {
      const on = name === way.value, points = data.ways[name], color = on ? 'var(--pb-blue)' : 'var(--pb-grey)';
      add(svg, 'polyline', {points: points.map(p => x(p.sparsity) + ',' + y(p.perplexity)).join(' '), fill: 'none', stroke: color, 'stroke-width': on ? 2 : 1, 'stroke-dasharray': on ? '' : '4 3'});
      for (const p of points) {
        add(svg, 'line', {x1: x(p.sparsity), x2: x(p.sparsity), y1: y(p.perplexity - p.stderr), y2: y(p.perplexity + p.stderr), stroke: color, 'stroke-width': 1.5});
        add(svg, 'circle', {cx: x(p.sparsity), cy: y(p.perplexity), r: 3, fill: color});
      }
      const last = points[points.length - 1];
      add(svg, 'text', {x: x(last.sparsity) - 6, y: y(last.perplexity) - 8, 'text-anchor': 'end', 'font-weight': on ? 700 : 400}, name);
    }
    add(svg, 'circle', {cx: x(line[i].sparsity), cy: y(line[i].perplexity), r: 9, fill: 'none', stroke: 'var(--pb-red)', 'stroke-width': 3});
    point.max = line.length - 1;
    told(point, plain(100*line[i].sparsity, 1) + ' %');
    say(root, sparsityWords(data, way.value, i));
    texts[0].textContent = 'Dense: ' + line[0].text;
    texts[1].textContent = i ? 'Pruned: ' + line[i].text : '';
    texts[1].hidden = !i;
  }
  root.addEventListener('input', update);
  update();
}
