# The trainer api: admits trainings, hands them to workers, leads them. No torch, no device.
#   docker build -f deploy/docker/trainer-api.Dockerfile -t likeness/trainer-api:0.1.0 .
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tools && python -m venv /opt/venv
WORKDIR /src
COPY requirements.lock pyproject.toml ./
RUN /opt/tools/bin/pip install -c requirements.lock grpcio-tools hatchling
# The requirements alone, so that a change of the sources leaves this layer as it is.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *project['optional-dependencies']['api'], sep='\n')" > requirements.txt \
    && /opt/venv/bin/pip install -c requirements.lock -r requirements.txt
COPY protos protos
RUN mkdir -p gen models && /opt/tools/bin/python -m grpc_tools.protoc -Iprotos --python_out=gen --grpc_python_out=gen \
    $(find protos -name '*.proto')
COPY services/__init__.py services/
COPY services/domain services/domain
COPY services/adapters services/adapters
COPY services/jobs services/jobs
COPY services/trainer services/trainer
RUN /opt/tools/bin/pip wheel -q --no-build-isolation --no-deps -w dist . \
    && /opt/venv/bin/pip install --no-deps dist/*.whl && /opt/venv/bin/pip uninstall -y pip

FROM ${PYTHON}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="likeness/trainer-api" \
      org.opencontainers.image.description="Training service of Likeness" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 likeness \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/likeness --no-create-home --shell /usr/sbin/nologin likeness \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/likeness
COPY --from=build /opt/venv /opt/venv
COPY deploy/docker/healthy.py /usr/local/lib/likeness/healthy.py
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LIKENESS_HOME=/var/lib/likeness LIKENESS_TRAINING_ADDR=0.0.0.0:8101
WORKDIR /var/lib/likeness
USER 10001:10001
EXPOSE 8101
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "/usr/local/lib/likeness/healthy.py", "127.0.0.1:8101"]
ENTRYPOINT ["python", "-m", "services.trainer", "api"]
