#!/bin/sh
# Rewrites release.txt, release.cuda.txt and test.txt from release.in and test.in.
# Needs uv. release.torch.txt is kept by hand: its head says how.
set -eu
cd "$(dirname "$0")"

compile() {
  uv pip compile --quiet --no-annotate --no-header --generate-hashes --no-emit-package torch \
    --python-version 3.11 --python-platform x86_64-manylinux_2_31 "$@"
}

write() {
  { printf '# %s\n# Regenerate: container/requirements/lock.sh\n' "$2"; cat; } > "$1"
}

all=$(compile release.in)
# What only torch's CUDA build needs goes into a file of its own.
is_cuda='/^[a-z]/ { cuda = /^(nvidia-|triton==)/ }'
printf '%s\n' "$all" | awk "$is_cuda !cuda" | write release.txt \
  'The stack release, without torch. Whole closure: install with --no-deps.'
printf '%s\n' "$all" | awk "$is_cuda cuda" | write release.cuda.txt \
  'What the CUDA build of torch loads; the CPU build needs none of it.'
compile --constraint release.txt test.in | write test.txt \
  "The trainer's tests inside the image, beside release.txt. Install with --no-deps."
