FROM python:3.13-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git \
    && rm -rf /var/lib/apt/lists/*

# The coding agent goes here, if AGENT_COMMAND is to start one. For example:
# RUN apt-get update \
#     && apt-get install --yes --no-install-recommends nodejs npm \
#     && rm -rf /var/lib/apt/lists/* \
#     && npm install --global @openai/codex

ENV PYTHONUNBUFFERED=1
WORKDIR /app

# Further packages: "PyJWT[crypto]>=2.8,<3" for sign-in as a GitHub App.
ARG EXTRAS=""
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt ${EXTRAS:+"$EXTRAS"}

COPY runner.py .

# The volume takes its owner from this folder.
RUN useradd --uid 1000 --create-home agent \
    && install --directory --owner=agent --group=agent --mode=700 .agent-runner
USER 1000
VOLUME /app/.agent-runner

CMD ["python", "runner.py"]
