// Perturbation game: guess which parts matter, see sub-models one by one, then the regression and the truth.
function solve(A, b) {                                       // linear equations by elimination; A and b are changed
  const n = b.length;
  for (let i = 0; i < n; i++) {
    let p = i;
    for (let r = i + 1; r < n; r++) if (Math.abs(A[r][i]) > Math.abs(A[p][i])) p = r;
    [A[i], A[p], b[i], b[p]] = [A[p], A[i], b[p], b[i]];
    for (let r = i + 1; r < n; r++) {
      const f = A[r][i]/A[i][i];
      for (let c = i; c < n; c++) A[r][c] -= f*A[i][c];
      b[r] -= f*b[i];
    }
  }
  for (let i = n - 1; i >= 0; i--) { for (let c = i + 1; c < n; c++) b[i] -= A[i][c]*b[c]; b[i] /= A[i][i]; }
  return b;
}
function ridge(X, y, ratio) {                                // least |y - Xw|^2 + ratio |w|^2
  const n = X[0].length, A = Array.from({length: n}, (_, i) => Array.from({length: n}, (_, j) => X.reduce((s, x) => s + x[i]*x[j], i === j ? ratio : 0)));
  return solve(A, Array.from({length: n}, (_, i) => X.reduce((s, x, k) => s + x[i]*y[k], 0)));
}
function top3(values) { return values.map((v, i) => [v, i]).sort((a, b) => b[0] - a[0]).slice(0, 3).map(p => p[1]).sort((a, b) => a - b); }
function hits(a, b) { return a.filter(i => b.includes(i)).length; }
function gameWords(data, guess, seen, shown) {
  const names = i => list(i.map(k => data.names[k])), m = data.masks.length;
  if (!seen && !shown) return 'Choose the three parts whose loss costs most' + (guess.length ? '; so far ' + names(guess) : '') + '. Then run sub-models.';
  let words = '';
  if (seen) {
    const gone = data.masks[seen - 1].map((v, i) => v ? i : -1).filter(i => i >= 0);
    words = 'Sub-model ' + seen + ' of ' + m + ', without ' + names(gone) + ': the loss ' + (data.rises[seen - 1] < 0 ? 'falls' : 'rises') + ' by ' + plain(Math.abs(data.rises[seen - 1]), 2) + ' nats. ';
    words += 'From ' + seen + ' the regression finds that ' + names(top3(ridge(data.masks.slice(0, seen), data.rises.slice(0, seen), data.ratio))) + ' cost most. ';
  }
  if (shown) {
    const truth = top3(data.truth);
    words += 'Taken out alone, ' + names(truth) + ' cost most.';
    if (guess.length) words += ' Your guess has ' + hits(guess, truth) + ' of them.';
    if (seen) words += ' The regression has ' + hits(top3(ridge(data.masks.slice(0, seen), data.rises.slice(0, seen), data.ratio)), truth) + '.';
  }
  return words;
}
function mount(root, data) {
  const n = data.names.length, picks = [...root.querySelectorAll('[name="pick"]')], [next, all, truth, again] = ['next', 'all', 'truth', 'again'].map(k => control(root, k));
  const prefixes = data.masks.map((_, m) => ridge(data.masks.slice(0, m + 1), data.rises.slice(0, m + 1), data.ratio));
  let guess = [], seen = 0, shown = false;
  function update() {
    const svg = canvas(root, 560, 250), estimate = seen ? prefixes[seen - 1] : null;
    const values = [0, ...data.truth, ...prefixes.flat()], marks = ticks(Math.min(...values), Math.max(...values), 4), y = scale(Math.min(...values), Math.max(...values), 190, 26), x = scale(0, n, 60, 555), w = x(1) - x(0);
    axis(svg, y, 60, 14, marks, true, 'rise in loss (nats)', v => plain(v, 1));
    add(svg, 'line', {x1: 60, x2: 555, y1: y(0), y2: y(0), stroke: 'currentColor', 'stroke-opacity': .6});
    for (let i = 0; i < n; i++) {
      const middle = x(i + .5);
      add(svg, 'text', {x: middle, y: 208, 'text-anchor': 'middle', 'font-weight': guess.includes(i) ? 700 : 400}, data.names[i].replace('block ', '') + (guess.includes(i) ? ' ✓' : ''));
      if (seen) add(svg, 'rect', {x: x(i) + .15*w, y: 218, width: .7*w, height: 12, fill: data.masks[seen - 1][i] ? 'var(--pb-red)' : 'none', stroke: 'currentColor'});
      if (estimate) add(svg, 'rect', {x: x(i) + .2*w, y: Math.min(y(0), y(estimate[i])), width: .6*w, height: Math.abs(y(0) - y(estimate[i])), fill: 'var(--pb-blue)'});
      if (shown) add(svg, 'path', {d: 'M' + middle + ' ' + (y(data.truth[i]) - 7) + ' l7 7 l-7 7 l-7 -7 z', fill: 'var(--pb-green)', stroke: 'currentColor'});
    }
    add(svg, 'text', {x: 2, y: 208}, 'block');
    if (seen) add(svg, 'text', {x: 2, y: 229}, 'left out');
    const legend = [[estimate, 'var(--pb-blue)', 'regression'], [shown, 'var(--pb-green)', 'truth: taken out alone']].filter(l => l[0]);
    legend.forEach(([, color, name], i) => { add(svg, 'rect', {x: 250 + 120*i, y: 4, width: 11, height: 11, fill: color}); add(svg, 'text', {x: 266 + 120*i, y: 14}, name); });
    picks.forEach((b, i) => { b.setAttribute('aria-pressed', guess.includes(i)); b.disabled = seen > 0 || shown || guess.length > 2 && !guess.includes(i); });
    next.disabled = all.disabled = seen >= data.masks.length;
    say(root, gameWords(data, guess, seen, shown));
  }
  picks.forEach((b, i) => b.addEventListener('click', () => { guess = guess.includes(i) ? guess.filter(k => k !== i) : [...guess, i].sort((a, b) => a - b); update(); b.focus(); }));
  next.addEventListener('click', () => { seen++; update(); });
  all.addEventListener('click', () => { seen = data.masks.length; update(); });
  truth.addEventListener('click', () => { shown = true; update(); });
  again.addEventListener('click', () => { guess = []; seen = 0; shown = false; update(); });
  update();
}
