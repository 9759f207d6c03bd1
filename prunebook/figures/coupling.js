// Coupling explorer: which rows and columns are removed with one unit, and what that saves.
function owned(table, unit) {                                // indices of one unit; consecutive units need no table
  return Array.isArray(table) ? table[unit] : Array.from({length: table.size}, (_, i) => table.start + unit*table.size + i);
}
function fallen(data, kind, unit) {                          // rows and columns that are removed, by module
  const k = data.kinds[kind], out = {}, at = n => out[n] = out[n] || {rows: [], columns: []};
  for (const [name, table] of k.firsts) at(name).rows.push(...owned(table, unit));
  at(k.second[0]).columns.push(...owned(k.second[1], unit));
  return out;
}
function unitAt(data, kind, name, row, column) {             // the unit that owns a row or column of a module; -1 if none does
  const k = data.kinds[kind], has = (table, i) => Array.from({length: k.units}, (_, u) => u).findIndex(u => owned(table, u).includes(i));
  for (const [n, table] of k.firsts) if (n === name && has(table, row) >= 0) return has(table, row);
  return k.second[0] === name ? has(k.second[1], column) : -1;
}
function couplingWords(data, kind, unit) {
  const k = data.kinds[kind], gone = fallen(data, kind, unit);
  const part = (what, i) => (i.length === 1 ? what : what + 's') + ' ' + ranges(i);
  const parts = Object.keys(gone).map(n => list([['row', gone[n].rows], ['column', gone[n].columns]].filter(p => p[1].length).map(p => part(...p))) + ' of ' + n);
  let words = k.label + ' ' + unit + ' of ' + plain(k.units) + ' in block ' + data.block + ': ' + list(parts) + ' are removed together, ' + plain(k.cost) + ' parameters, ' +
    plain(100*k.cost/data.total, 2) + ' % of the block.';
  if (k.rise) words += ' Without it the loss ' + (k.rise[unit] < 0 ? 'falls' : 'rises') + ' by ' + plain(Math.abs(k.rise[unit]), 3) + ' nats per token (measured on ' + data.text + ').';
  if (k.groups > 1) words += ' In a smaller model each of the ' + k.groups + ' key-value heads must lose the same number, so that at least ' + plain(k.cost*k.groups) + ' parameters are removed.';
  return words;
}
function mount(root, data) {
  const kind = control(root, 'kind'), unit = control(root, 'unit'), wide = 560, gap = 26;
  const rows = [data.modules.filter(m => m.attention), data.modules.filter(m => !m.attention)];
  const s = Math.min(...rows.map(r => (wide - gap*r.length)/r.reduce((a, m) => a + m.columns, 0)), 170/Math.max(...data.modules.map(m => m.rows)));
  function update() {
    const k = data.kinds[kind.value];
    unit.max = k.units - 1;
    if (+unit.value > k.units - 1) unit.value = k.units - 1;
    const gone = fallen(data, kind.value, +unit.value), svg = canvas(root, wide, rows.reduce((a, r) => a + 28 + s*Math.max(...r.map(m => m.rows)), 4));
    let y = 18;
    for (const r of rows) {
      let x = 4;
      for (const m of r) {
        const w = s*m.columns, h = s*m.rows, g = gone[m.name] || {rows: [], columns: []};
        add(svg, 'text', {x: x, y: y - 5}, m.name);
        const box = add(svg, 'rect', {x: x, y: y, width: w, height: h, fill: 'currentColor', 'fill-opacity': .08, stroke: 'currentColor', 'stroke-opacity': .6});
        for (const [a, b] of runs(g.rows)) add(svg, 'rect', {x: x, y: y + s*a, width: w, height: Math.max(2, s*(b - a + 1)), fill: 'var(--pb-blue)', 'pointer-events': 'none'});
        for (const [a, b] of runs(g.columns)) add(svg, 'rect', {x: x + s*a, y: y, width: Math.max(2, s*(b - a + 1)), height: h, fill: 'var(--pb-red)', 'pointer-events': 'none'});
        box.addEventListener('click', e => {
          const at = box.getBoundingClientRect(), inside = (p, low, size, n) => Math.min(n - 1, Math.max(0, Math.floor((p - low)/size*n)));
          const u = unitAt(data, kind.value, m.name, inside(e.clientY, at.top, at.height, m.rows), inside(e.clientX, at.left, at.width, m.columns));
          if (u >= 0) { unit.value = u; update(); }
        });
        x += Math.max(w, 9*m.name.length) + gap;
      }
      y += 28 + s*Math.max(...r.map(m => m.rows));
    }
    told(unit, unit.value);
    say(root, couplingWords(data, kind.value, +unit.value));
  }
  root.addEventListener('input', update);
  update();
}
