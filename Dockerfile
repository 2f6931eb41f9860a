# syntax=docker/dockerfile:1
# batchserve with its embedded database, storage and worker in one container; /data holds everything it writes. With
# --build-arg EXTRAS=fast,postgres,s3 the same image is a process of a cluster.

FROM python:3.13-slim AS build
WORKDIR /source
COPY constraints.txt ./
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY batchserve batchserve
# What is installed with it. fast, 210 MB of numba and LLVM, scores forests and boosted trees and reads CSV several times as fast.
ARG EXTRAS=fast
RUN python -m venv /opt/batchserve \
    && python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && /opt/batchserve/bin/pip install --no-cache-dir --constraint constraints.txt "$(echo /wheels/*.whl)[$EXTRAS]"

FROM python:3.13-slim
# A fixed uid, so that a mounted folder can be given to it: chown 10001:10001.
RUN groupadd --gid 10001 batchserve \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin batchserve \
    && install --directory --owner 10001 --group 10001 --mode 0750 /data
COPY --from=build /opt/batchserve /opt/batchserve
ENV PATH=/opt/batchserve/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    BATCHSERVE_STORAGE=/data \
    ORT_DISABLE_TELEMETRY=1
# With a read-only root and no /tmp, temporary files go to the working directory.
WORKDIR /data
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["batchserve"]
# Loopback of a container is not reachable from outside, so the server must listen on every address. That requires an
# admin key in the database, or the option --insecure: see docker-compose.yml.
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
