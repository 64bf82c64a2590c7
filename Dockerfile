# The runner's image: Python, git, tini, two packages and one file. `docker build .` makes it. What may be added:
#   --build-arg NPM="@openai/codex@0.171.0"          agents from npm, and Node.js for them
#   --build-arg EXTRAS="PyJWT[crypto]>=2.8,<3"       packages from PyPI; this one is for sign-in as a GitHub App
#   --build-arg VERSION=0.1.0 --build-arg SOURCE=... what the labels say

# Versions of packages are not pinned here, so that a new build brings what has been mended.
# hadolint global ignore=DL3008,DL3016

FROM python:3.13-slim AS runner

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# The volume takes its owner from this folder. Nothing else in the image belongs to the user.
RUN useradd --uid 1000 --user-group --no-create-home --home-dir /nonexistent agent \
    && install --directory --owner=agent --group=agent --mode=700 .agent-runner

# npm is gone when the layer is done; what it has installed, and Node.js, stay. Debian's npm would also fetch what is
# for systems with musl, so that it only gets a newer one to do the work.
ARG NPM=""
RUN if [ -n "$NPM" ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends nodejs npm \
        && npx --yes --cache /tmp/npm npm@11 install --global --no-audit --no-fund --cache /tmp/npm $NPM \
        && apt-get purge --yes --auto-remove npm \
        && rm -rf /tmp/npm /var/lib/apt/lists/*; \
    fi

ARG EXTRAS=""
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt $EXTRAS

COPY runner.py .

# The base image has no compiled modules, and the user cannot write any: this leaves those that are needed.
RUN python -c "import runner"

# The status page is for this container only, until AGENT_HTTP_HOST says otherwise.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 AGENT_HTTP_PORT=8080
USER 1000
VOLUME /app/.agent-runner

# Asks that page. Where somebody has set AGENT_HTTP_PORT to nothing, there is nobody to ask.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-ISc", "\
import os, socket\n\
port = os.environ.get('AGENT_HTTP_PORT')\n\
if port:\n\
    page = socket.create_connection(('127.0.0.1', port), 3)\n\
    page.sendall(b'GET /healthz HTTP/1.0\\r\\n\\r\\n')\n\
    raise SystemExit(b' 200 ' not in page.recv(64))\n\
"]

# -s: it also takes care of orphans where Docker's own init, and not this one, is process 1.
ENTRYPOINT ["tini", "-s", "--"]
# As a module, whose bytecode is there already: it starts sooner, and has 15 MB less.
CMD ["python", "-m", "runner"]

ARG VERSION=0.1.0
ARG SOURCE=https://github.com/you/agent-runner
LABEL org.opencontainers.image.title="Agent runner" \
      org.opencontainers.image.description="Turns labelled GitHub issues into pull requests with any coding agent" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.source=$SOURCE \
      org.opencontainers.image.licenses=MIT

# The same with a stand-in for GitHub, to see the whole story without an account.
FROM runner AS demo
COPY tests/demo.py tests/standin.py tests/
HEALTHCHECK NONE
CMD ["python", "tests/demo.py"]

# The last stage is what is built unless another one is named.
FROM runner
