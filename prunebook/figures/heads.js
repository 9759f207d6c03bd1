// Heads under a threshold: which attention heads of a block look at the same tokens, and which are removed.
function matrix(upper, n) {                                  // distances above the diagonal -> symmetric matrix
  const D = Array.from({length: n}, () => Array(n).fill(0));
  let k = 0;
  for (let i = 0; i < n; i++) for (let j = i + 1; j < n; j++) D[i][j] = D[j][i] = upper[k++];
  return D;
}
function removalOrder(D, groups) {                           // pairs [head, distance]; the closest pair first, the less central head is removed
  const n = D.length, size = n/groups, alive = Array(n).fill(true), left = Array(groups).fill(size), pairs = [], order = [];
  const total = D.map(row => row.reduce((a, b) => a + b, 0));
  for (let i = 0; i < n; i++) for (let j = i + 1; j < n; j++) pairs.push([D[i][j], i, j]);
  pairs.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
  for (const [d, i, j] of pairs) {
    const head = (total[j] > total[i] ? [j, i] : [i, j]).find(h => left[Math.floor(h/size)] > 1);
    if (!alive[i] || !alive[j] || head === undefined) continue;
    alive[head] = false;
    left[Math.floor(head/size)]--;
    order.push([head, d]);
  }
  return order;
}
function leaving(D, groups, tau) { return removalOrder(D, groups).filter(p => p[1] < tau).map(p => p[0]).sort((a, b) => a - b); }
function twins(D, gone) {                                    // for each removed head, the closest one that stays
  const stay = D.map((_, i) => i).filter(i => !gone.includes(i));
  return gone.map(h => stay.reduce((best, s) => D[h][s] < D[h][best] ? s : best, stay[0]));
}
function headWords(data, block, tau) {
  const all = data.blocks.map(u => leaving(matrix(u, data.heads), data.groups, tau)), gone = all[block], count = all.reduce((a, g) => a + g.length, 0);
  const near = twins(matrix(data.blocks[block], data.heads), gone), pair = gone.map((h, i) => h + ' (like ' + near[i] + ')');
  return 'Under τ = ' + plain(tau, 2) + ' block ' + block + ' loses ' + (gone.length ? (gone.length > 1 ? 'heads ' : 'head ') + list(pair) : 'no head') + '. In the whole model ' +
    plain(count) + ' of ' + plain(data.heads*data.blocks.length) + ' query heads are removed.';
}
function mount(root, data) {
  const tau = control(root, 'tau'), block = control(root, 'block'), n = data.heads, cell = 210/n, left = 26, top = 24;
  function update() {
    const t = +tau.value, b = +block.value, D = matrix(data.blocks[b], n), gone = leaving(D, data.groups, t), near = twins(D, gone), svg = canvas(root, 560, 272);
    const at = (i, from) => from + cell*(i + .5);
    add(svg, 'text', {x: left, y: 12}, 'block ' + b + ': the bluer, the more alike');
    for (let i = 0; i < n; i++) {
      add(svg, 'text', {x: left - 6, y: at(i, top) + 4, 'text-anchor': 'end'}, i);
      add(svg, 'text', {x: at(i, left), y: top + 210 + 15, 'text-anchor': 'middle'}, i);
      for (let j = 0; j < n; j++) add(svg, 'rect', {x: left + cell*j, y: top + cell*i, width: cell, height: cell, fill: 'var(--pb-blue)', 'fill-opacity': Math.max(0, 1 - D[i][j]/.6).toFixed(3), stroke: 'currentColor', 'stroke-opacity': .15});
    }
    for (let g = 0; g < data.groups; g++) add(svg, 'rect', {x: left + 210*g/data.groups, y: top + 210*g/data.groups, width: 210/data.groups, height: 210/data.groups, fill: 'none', stroke: 'currentColor', 'stroke-width': 1.5});
    gone.forEach((h, i) => {
      add(svg, 'line', {x1: at(h, left), y1: at(h, top), x2: at(near[i], left), y2: at(h, top), stroke: 'currentColor', 'stroke-width': 2});
      add(svg, 'circle', {cx: at(near[i], left), cy: at(h, top), r: 4, fill: 'currentColor'});
      for (const s of [-1, 1]) add(svg, 'line', {x1: at(h, left) - 7, x2: at(h, left) + 7, y1: at(h, top) - 7*s, y2: at(h, top) + 7*s, stroke: 'var(--pb-red)', 'stroke-width': 3.5});
    });
    const x = scale(0, data.blocks.length, 300, 555), most = n - data.groups, y = scale(0, most, 234, top + 6);
    axis(svg, y, 300, 12, [0, most], true, '', v => v);
    add(svg, 'text', {x: 276, y: 12}, 'removed heads, block by block');
    add(svg, 'line', {x1: 300, x2: 555, y1: y(most), y2: y(most), stroke: 'currentColor', 'stroke-dasharray': '3 3', 'stroke-opacity': .6});
    data.blocks.forEach((u, i) => {
      const k = leaving(matrix(u, n), data.groups, t).length, w = x(1) - x(0);
      add(svg, 'rect', {x: x(i) + .1*w, y: y(k), width: .8*w, height: y(0) - y(k), fill: i === b ? 'var(--pb-red)' : 'var(--pb-blue)'});
      if (i === b) add(svg, 'path', {d: 'M' + x(i + .5) + ' 237 l-5 8 h10 z', fill: 'var(--pb-red)'});
    });
    add(svg, 'line', {x1: 300, x2: 555, y1: 234, y2: 234, stroke: 'currentColor', 'stroke-opacity': .6});
    add(svg, 'text', {x: 428, y: 262, 'text-anchor': 'middle'}, 'block');
    told(tau, plain(t, 2)); told(block, '' + b);
    say(root, headWords(data, b, t));
  }
  root.addEventListener('input', update);
  update();
}
