#!/usr/bin/env bash
# Build the site into _docs/ with Quarto. Quarto only warns about broken links, references and citations: here a warning
# is an error. Run it through `make docs`, which puts the environment's nbdev first on the path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command -v quarto > /dev/null || { echo 'Quarto is not installed: see https://quarto.org' >&2; exit 1; }

log=$(mktemp)
trap 'rm -f "$log"' EXIT

rm -rf _proc _docs
python scripts/make_api.py
nbdev_proc_nbs
python scripts/site_files.py _proc
(cd _proc && NO_COLOR=1 quarto render --no-cache) 2>&1 | sed 's/\x1b\[[0-9;]*m//g' | tee "$log"

if grep -nE '^\[?(WARN(ING)?|ERROR)\b' "$log" > /dev/null; then
  printf '\nQuarto warned:\n'
  grep -nE '^\[?(WARN(ING)?|ERROR)\b' "$log"
  exit 1
fi

mv _proc/_docs _docs
echo 'The site is in _docs/'
