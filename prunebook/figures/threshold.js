// One threshold over all layers: the share of each block's channels that falls as it rises.
function thresholdWords(data, damp, i) {
  const l = data.levels[damp][i], whole = l.gone.map((g, b) => g < .005 ? b : -1).filter(b => b >= 0), most = l.gone.reduce((best, g, b) => g > l.gone[best] ? b : best, 0);
  if (!l.sparsity) return 'The threshold is zero: nothing falls.';
  return 'Every channel that costs less than ' + l.threshold.toExponential(1) + ' nats per token falls, ' + plain(100*l.sparsity, 1) + ' % of the decoder. Block ' + most + ' gives most, ' +
    plain(100*l.gone[most]) + ' % of its channels; ' + (whole.length ? (whole.length > 1 ? 'blocks ' : 'block ') + ranges(whole) + (whole.length > 1 ? ' stay' : ' stays') + ' whole' : 'every block gives some') +
    '. An equal share would be ' + plain(100*l.uniform) + ' %.';
}
function mount(root, data) {
  const damp = control(root, 'damp'), level = control(root, 'level'), n = Object.values(data.levels)[0][0].gone.length;
  function update() {
    const line = data.levels[damp.value], i = +level.value, l = line[i], svg = canvas(root, 560, 250), x = scale(0, n, 50, 555), y = scale(0, 1, 205, 26), w = x(1) - x(0);
    axis(svg, y, 50, 14, [0, .25, .5, .75, 1], true, "share of the block's channels that falls", v => plain(100*v) + ' %');
    l.gone.forEach((g, b) => add(svg, 'rect', {x: x(b) + .1*w, y: y(g), width: .8*w, height: y(0) - y(g), fill: 'var(--pb-blue)'}));
    add(svg, 'line', {x1: 50, x2: 555, y1: y(l.uniform), y2: y(l.uniform), stroke: 'var(--pb-red)', 'stroke-width': 2, 'stroke-dasharray': '6 4'});
    add(svg, 'text', {x: 54, y: y(l.uniform) - 6}, 'equal share');
    add(svg, 'line', {x1: 50, x2: 555, y1: 205, y2: 205, stroke: 'currentColor', 'stroke-opacity': .6});
    for (let b = 0; b < n; b += Math.ceil(n/10)) add(svg, 'text', {x: x(b + .5), y: 222, 'text-anchor': 'middle'}, b);
    add(svg, 'text', {x: 302, y: 242, 'text-anchor': 'middle'}, 'block');
    told(level, plain(100*l.sparsity, 1) + ' %');
    say(root, thresholdWords(data, damp.value, i));
  }
  root.addEventListener('input', update);
  update();
}
