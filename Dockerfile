# Serve the pictures in the volume at /data:
#   docker run -p 3000:3000 -v lookalike:/data --read-only --tmpfs /tmp lookalike
# Add a folder of pictures while the service is stopped (a store has one writer):
#   docker run --rm -v lookalike:/data -v "$PWD/pictures:/pictures:ro" lookalike \
#     index /pictures --store /data/store
# Serve with an encoder of your own, which must be the store's:
#   docker run … -v "$PWD/models/mine:/model:ro" -e LOOKALIKE_MODEL=/model lookalike
# `make image` builds it with the labels of its version. ACCELERATOR=gpu takes CUDA from wheels; run it with --gpus all.
# ACCELERATOR=openvino adds OpenVINO, EXTRAS=milvus what a store on Milvus needs.
ARG ACCELERATOR=cpu
ARG EXTRAS=

FROM python:3.11-slim AS build
ARG ACCELERATOR
ARG EXTRAS
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends binutils tini && rm -rf /var/lib/apt/lists/*
COPY requirements/image-build.txt requirements/
RUN python -m venv tools && tools/bin/pip install --no-cache-dir --require-hashes -r requirements/image-build.txt

# The locked set rarely changes, so its layers lie below the code.
COPY requirements/image-*.txt requirements/
RUN python -m venv --without-pip /opt/lookalike \
    && tools/bin/uv pip install --no-cache --python /opt/lookalike --require-hashes \
        -r "requirements/image-$ACCELERATOR${EXTRAS:+-$EXTRAS}.txt" \
    && tools/bin/cyclonedx-py environment --output-reproducible --output-file packages.cdx.json /opt/lookalike
COPY pyproject.toml lookalike.py ./
COPY service service
COPY deploy/image deploy/image
# The code lies in /app, and the environment finds it there. The same bytes come out of every build: bytecode with hashes
# in place of times, and no note of uv's on the time of the wheel. A strict umask on the build machine may hide files
# from the serving user.
RUN tools/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation . \
    && tools/bin/uv pip install --no-cache --python /opt/lookalike --target /app --no-deps lookalike-*.whl \
    && rm /app/lookalike-*.dist-info/uv_cache.json && sed -i /uv_cache.json/d /app/lookalike-*.dist-info/RECORD \
    && echo /app > "$(echo /opt/lookalike/lib/python3*/site-packages)/lookalike.pth" \
    && cp packages.cdx.json /app/sbom.cdx.json \
    && /app/bin/lookalike import efficientnet-lite0 --out /app/.lookalike/models/photos \
    && python deploy/image/slim.py /opt/lookalike \
    && find /app /opt/lookalike -name '*.pyc' -delete \
    && PYTHONHASHSEED=0 /opt/lookalike/bin/python -m compileall -q --invalidation-mode unchecked-hash /app /opt/lookalike/lib \
    && find /app /opt/lookalike ! -type l ! -perm -a=r -exec chmod a+rX {} +

FROM python:3.11-slim
COPY --from=build /usr/bin/tini-static /usr/local/bin/tini
# Python's image comes without the bytecode of its library, and nobody could write it later. Lines in place of useradd,
# which notes the day.
RUN pip uninstall --yes --quiet --root-user-action=ignore pip setuptools wheel \
    && rm -rf /usr/local/lib/python3*/ensurepip /root/.cache \
    && PYTHONHASHSEED=0 python -m compileall -q --invalidation-mode unchecked-hash -x '/(test|tests|idlelib|lib2to3|tkinter|turtledemo|pydoc_data)/' /usr/local/lib/python3* \
    && echo 'lookalike:x:65532:65532::/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'lookalike:x:65532:' >> /etc/group \
    && install -d -o 65532 -g 65532 /data
COPY --from=build /opt/lookalike /opt/lookalike
COPY --from=build /app /app
WORKDIR /app

# BentoML and onnxruntime send telemetry by default.
ENV PATH=/app/bin:/opt/lookalike/bin:$PATH \
    LOOKALIKE_HOST=0.0.0.0 \
    LOOKALIKE_STORE=/data/store \
    BENTOML_HOME=/tmp/bentoml \
    BENTOML_DO_NOT_TRACK=True \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1
USER 65532:65532
VOLUME /data
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-Ic", "import os, sys; \
from http.client import HTTPConnection; \
server = HTTPConnection('127.0.0.1', int(os.environ.get('LOOKALIKE_PORT', 3000)), timeout=4); \
server.request('GET', '/readyz'); sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "lookalike"]
CMD ["serve"]

ARG VERSION=
ARG COMMIT=
ENV LOOKALIKE_COMMIT=$COMMIT
LABEL org.opencontainers.image.title="Lookalike" \
      org.opencontainers.image.description="Similarity search over your pictures, over HTTP." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$COMMIT
