# A CPU image with the command line and the shipped recipes. Written without Docker at hand: never built.
#
#   docker build -t deepgrpo .
#   docker run --rm -v "$PWD/runs:/work/runs" deepgrpo train demo
FROM python:3.12-slim

WORKDIR /opt/deepgrpo
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch \
 && pip install --no-cache-dir --constraint constraints.txt ".[lora,data,gguf,plots,frames]"

# runs/ is written under the working directory
RUN useradd --create-home deepgrpo && mkdir -p /work && chown deepgrpo /work
USER deepgrpo
WORKDIR /work
ENTRYPOINT ["deepgrpo"]
CMD ["--help"]
