"""The job on Hugging Face Jobs: `python hf_app.py run`, and retrain, status, fetch, sample, tag. See docs/hf-jobs.md.

The work itself is done in `job`, in the image TAGGER_HFJOBS_IMAGE; this needs the package only.
"""

from __future__ import annotations

import sys

from job.cloud import hfjobs_launcher
from job.system import streams

if __name__ == "__main__":
    streams.protect()
    hfjobs_launcher.perform(sys.argv[1:])
