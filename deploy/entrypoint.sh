#!/bin/sh
# Run the job when called with one of its commands, an option or nothing; run anything else as a program.
# exec: the job becomes process 1 and receives signals itself. It waits for every process that it starts, one for each
# GPU if there are several, so no init is needed.
case "${1-}" in
"" | -* | run | check | prefetch | retrain | evaluate | push | promote | sample | tag | tune | runs | compare | settings)
    # copy a data set that is part of the image: the library `datasets` writes lock files next to what it reads
    if [ -d /baked/cache/datasets ]; then
        trap 'kill "$copy" 2> /dev/null; exit 75' TERM INT # process 1 ignores a signal that it has no trap for
        cp -Ru /baked/cache/datasets "$HF_HOME" &
        copy=$!
        wait "$copy"
        trap - TERM INT
    fi
    exec python -m job "$@"
    ;;
*) exec "$@" ;;
esac
