# Serve the pictures in the volume at /data:
#   docker run -p 3000:3000 -v lookalike:/data --read-only --tmpfs /tmp lookalike
# Add a folder of pictures while the service is stopped (a store has one writer):
#   docker run --rm -v lookalike:/data -v "$PWD/pictures:/pictures:ro" lookalike \
#     index /pictures --store /data/store
# The default is the encoder for photographs; --model models/digits selects the one for handwritten digits.
FROM python:3.11-slim
WORKDIR /app

# The locked set and the user rarely change, so their layers lie below the code. The build compiles bytecode, because the
# serving user cannot write it and would compile all modules at every start.
COPY requirements/serve-cpu.txt requirements/
RUN pip install --no-cache-dir --root-user-action=ignore uv==0.13.9 \
    && uv pip install --system --no-cache --compile-bytecode --require-hashes -r requirements/serve-cpu.txt \
    && pip uninstall --yes --root-user-action=ignore uv \
    && rm -f /tmp/uv-*.lock
RUN useradd --uid 10001 --user-group --home-dir /tmp --no-create-home --shell /usr/sbin/nologin lookalike \
    && install -d -o lookalike -g lookalike /data

# A strict umask on the build machine may hide files; chmod makes them readable to the serving user.
COPY models/digits models/digits
COPY pyproject.toml lookalike.py ./
COPY service service
RUN pip install --no-cache-dir --root-user-action=ignore --no-deps --no-build-isolation --editable . \
    && python -m compileall -q lookalike.py service \
    && lookalike import efficientnet-lite0 --out .lookalike/models/photos \
    && find . ! -perm -a=r -exec chmod a+rX {} +

# BentoML and onnxruntime send telemetry by default.
ENV LOOKALIKE_HOST=0.0.0.0 \
    LOOKALIKE_STORE=/data/store \
    BENTOML_HOME=/tmp/bentoml \
    BENTOML_DO_NOT_TRACK=True \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
VOLUME /data
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-Ic", "import os, sys; \
from http.client import HTTPConnection; \
server = HTTPConnection('127.0.0.1', int(os.environ.get('LOOKALIKE_PORT', 3000)), timeout=4); \
server.request('GET', '/readyz'); sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["lookalike"]
CMD ["serve"]
