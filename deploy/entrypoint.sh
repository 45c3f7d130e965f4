#!/bin/sh
# Run the job when called with one of its commands, an option or nothing; run anything else as a program.
# exec: the job becomes process 1 and receives signals itself. It starts no children, so no init is needed.
case "${1-}" in
"" | -* | run | check | prefetch | retrain | evaluate | push | promote | sample | settings)
    # copy a data set that is part of the image: the library `datasets` writes lock files next to what it reads
    [ ! -d /baked/cache/datasets ] || cp -Ru /baked/cache/datasets "$HF_HOME"
    exec python -m job "$@"
    ;;
*) exec "$@" ;;
esac
