#!/bin/sh
# A command of the job, its options or nothing: the job. Anything else is another program and runs as it is.
# exec, so that signals reach it. It has no children of its own, so that nothing need be reaped.
case "${1-}" in
"" | -* | run | check | prefetch | retrain | evaluate | push | promote | sample | settings)
    # a data set in the image, for datasets locks what it reads
    [ ! -d /baked/cache/datasets ] || cp -Ru /baked/cache/datasets "$HF_HOME"
    exec python -m job "$@"
    ;;
*) exec "$@" ;;
esac
