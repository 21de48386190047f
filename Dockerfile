# What GKE runs: this project with its extras for TPUs and buckets, and nothing else. `launch/gke/gke.sh build` builds and pushes it.
FROM python:3.12.12-slim-bookworm AS build
RUN python -m venv /venv
WORKDIR /src
COPY constraints.txt ./
COPY pyproject.toml setup.py README.md LICENSE ./
COPY f2llm_jax f2llm_jax
COPY configs configs
RUN /venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[tpu,gcs]'

FROM python:3.12.12-slim-bookworm
RUN useradd --create-home --uid 1000 f2llm
COPY --from=build /venv /venv
COPY --chown=f2llm configs /home/f2llm/configs
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/f2llm
CMD ["python", "-m", "f2llm_jax.main", "--help"]
