# micronet on a CPU:  docker build -t micronet .  &&  docker run --rm -v "$PWD:/work" micronet quantize net.safetensors --mode ptq
# Smaller, without CUDA libraries: pass --build-arg PIP_EXTRA_INDEX_URL with PyTorch's index of CPU wheels.
FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL
COPY . /src
RUN pip install --no-cache-dir '/src[fast,openvino]' && rm -rf /src && useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["micronet"]
