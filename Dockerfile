# A CPU image with the command line and the shipped recipes. Written without Docker at hand: its commands were tried one by one, and
# the image was never built.
#
#   docker build -t deepgrpo .
#   mkdir -p runs && docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/runs:/work/runs" deepgrpo train demo
FROM python:3.12-slim

WORKDIR /opt/deepgrpo
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch \
 && pip install --no-cache-dir --constraint constraints.txt ".[lora,data,gguf,plots,frames]"

# runs/ is written under the working directory, by a user that need not have a name: --user makes the files yours
RUN mkdir -p /work/runs && chmod -R 777 /work
ENV HOME=/work USER=deepgrpo
USER 1000
WORKDIR /work
ENTRYPOINT ["deepgrpo"]
CMD ["--help"]
