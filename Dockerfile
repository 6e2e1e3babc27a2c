# docker build --build-arg EXTRAS=gpu,ocr,log -t dgpo_fast .     for NVIDIA GPUs
# docker build -t dgpo_fast .                                    for CPUs
# docker run --gpus all -v "$PWD:/work" dgpo_fast train sd35m-ocr
FROM python:3.12-slim
ARG EXTRAS=ocr
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY dgpo_fast dgpo_fast
COPY kernels kernels
# Triton and torch.compile build with a C compiler.
RUN --mount=type=cache,target=/var/lib/apt/lists apt-get update && apt-get install -y --no-install-recommends g++
RUN pip install ".[${EXTRAS}]"
RUN dgpo-fast recipes
WORKDIR /work
ENTRYPOINT ["dgpo-fast"]
CMD ["train"]
