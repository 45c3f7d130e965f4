# The job as an image: `docker build -t tagger-job .`, then `docker run --gpus all -e HF_TOKEN tagger-job`.
# PyTorch's wheels contain the CUDA libraries, so the base image has none. Build arguments:
#   UV_TORCH_BACKEND=cpu   install PyTorch's CPU build, for laptops and CI; use it with BASE_IMAGE=ubuntu:24.04
#   BAKE=1                 put base model and data set into the image, which then works offline; the TAGGER_BASE_* and
#                          TAGGER_DATA_* arguments below choose them, --secret id=hf_token reads gated or private ones
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701

FROM ${BASE_IMAGE} AS build
# hadolint ignore=DL3008 # the base image pins the release; its archive drops a version at the next security fix
RUN python3 -c "import ensurepip" 2>/dev/null || { \
        apt-get update \
        && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; }
WORKDIR /build
COPY requirements-build.lock ./
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/python -m pip install --no-cache-dir --no-deps --require-hashes -r requirements-build.lock \
    && python3 -m venv /opt/venv
# use the system's certificates; copy from the cache mount, because hard links do not cross file systems
ENV PATH=/opt/venv/bin:/opt/uv/bin:$PATH VIRTUAL_ENV=/opt/venv UV_SYSTEM_CERTS=1 UV_LINK_MODE=copy
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --require-hashes -r requirements.lock
# PyPI's build of torch is pinned by hash; the builds for CPUs and other CUDA versions, from other indexes, by version
ARG UV_TORCH_BACKEND
ARG UV_FIND_LINKS
COPY requirements-torch.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ -z "$UV_TORCH_BACKEND$UV_FIND_LINKS" ]; then \
        uv pip install --compile-bytecode --no-deps --require-hashes -r requirements-torch.lock; \
    else \
        uv pip install --compile-bytecode "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements-torch.lock)"; \
    fi \
    && find /opt/venv -type d -name tests -prune -exec rm -rf {} + \
    && python -c "import sysconfig; open(sysconfig.get_path('purelib') + '/job.pth', 'w').write('/app\n')"
COPY job/ /app/job/
# do not compare time stamps: copying between stages may change them
RUN python -m compileall -q --invalidation-mode unchecked-hash /app
ARG BAKE
ARG HF_ENDPOINT
ARG TAGGER_BASE_MODEL
ARG TAGGER_BASE_REVISION
ARG TAGGER_DATA_DATASET
ARG TAGGER_DATA_REVISION
ARG TAGGER_DATA_SPLIT
RUN --mount=type=secret,id=hf_token \
    mkdir /baked && { [ -z "$BAKE" ] || HF_HOME=/baked/cache python -m job prefetch; }

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008 # as in the build stage
RUN python3 -c "" 2>/dev/null || { \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3 \
        && rm -rf /var/lib/apt/lists/*; }
# a new volume takes over this mode, which lets any --user write to it
RUN mkdir --mode=1777 /runs /cache
COPY --from=build /opt/venv /opt/venv
ARG BAKE
ARG TAGGER_BASE_MODEL
ARG TAGGER_BASE_REVISION
ARG TAGGER_DATA_DATASET
ARG TAGGER_DATA_REVISION
ARG TAGGER_DATA_SPLIT
COPY --from=build /baked /baked
COPY --chmod=755 deploy/entrypoint.sh /usr/local/bin/tagger-job
COPY --from=build /app /app
# USER: torch calls getpass, which fails for a user id that has no name
ENV PATH=/opt/venv/bin:$PATH \
    USER=tagger \
    HOME=/cache \
    HF_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TAGGER_RUN_DIR=/runs
ENV HF_HUB_OFFLINE=$BAKE \
    HF_HUB_CACHE=${BAKE:+/baked}/cache/hub \
    TAGGER_BASE_MODEL=$TAGGER_BASE_MODEL \
    TAGGER_BASE_REVISION=$TAGGER_BASE_REVISION \
    TAGGER_DATA_DATASET=$TAGGER_DATA_DATASET \
    TAGGER_DATA_REVISION=$TAGGER_DATA_REVISION \
    TAGGER_DATA_SPLIT=$TAGGER_DATA_SPLIT
USER 1000:1000
VOLUME ["/runs", "/cache"]
WORKDIR /app
LABEL org.opencontainers.image.title="tagger-job" \
    org.opencontainers.image.description="Fine-tunes a small language model into a tagger and publishes it" \
    org.opencontainers.image.licenses="Apache-2.0 AND CC0-1.0"
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.version=$VERSION org.opencontainers.image.revision=$REVISION
# the manifest of a run records it; an image has no git
ENV IMAGE_REVISION=$REVISION
ENTRYPOINT ["/usr/local/bin/tagger-job"]
