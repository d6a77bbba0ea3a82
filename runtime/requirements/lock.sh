#!/bin/sh
# Rewrites STACK.txt and STACK.cuda.txt from STACK.in for the pinned stacks, test.txt from test.in, and
# uv.txt from uv.in.
# Needs uv. STACK.torch.txt is kept by hand: its head says how.
set -eu
cd "$(dirname "$0")"

compile() {
  uv pip compile --quiet --no-annotate --no-header --generate-hashes --no-emit-package torch \
    --python-version 3.11 --python-platform x86_64-manylinux_2_31 "$@"
}

write() {
  { printf '# %s\n# Regenerate: runtime/requirements/lock.sh\n' "$2"; cat; } > "$1"
}

# What only torch's CUDA build needs goes into a file of its own.
is_cuda='/^[a-z]/ { cuda = /^(nvidia-|triton==)/ }'
for stack in release guide; do
  all=$(compile $stack.in)
  printf '%s\n' "$all" | awk "$is_cuda !cuda" | write $stack.txt \
    "The stack $stack, without torch. Whole closure: install with --no-deps."
  printf '%s\n' "$all" | awk "$is_cuda cuda" | write $stack.cuda.txt \
    'What the CUDA build of torch loads; the CPU build needs none of it.'
done
compile --constraint release.txt --constraint guide.txt test.in | write test.txt \
  "The trainer's tests inside the image, beside the stack. Install with --no-deps."
compile uv.in | write uv.txt 'For workers whose Python is not the one of their stack.'
