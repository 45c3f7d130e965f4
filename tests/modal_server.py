"""A local server for Modal: the requests that its command line and its containers make, and a worker.

The worker runs the real container entry point for the inputs that were sent, one container at a time, each with the
volumes as last committed. A test can tell it to signal a container.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from google.protobuf import message_factory
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Server, Stream
from modal._serialization import deserialize_data_format
from modal_proto import api_pb2 as api

ROOT = Path(__file__).parents[1]
LOCKS = tuple(file.name for file in sorted(ROOT.glob("requirements*.lock")))
SOURCES = ("modal_app.py", "job", "Dockerfile", ".dockerignore", "pyproject.toml", "deploy", *LOCKS)
MODAL = Path(sys.executable).with_name("modal")
DONE = api.GenericResult.GENERIC_STATUS_SUCCESS
CANCELLED = api.GenericResult.GENERIC_STATUS_TERMINATED


@dataclass
class Input:
    """An input of a function call, with its output once there is one."""

    id: str
    call: str
    function: str
    index: int
    content: Any
    output: Any = None


@dataclass
class Loss:
    """A signal to send to the container that commits this folder of the runs volume, or that gets this input."""

    signal: signal.Signals
    folder: str | None = None
    input: str | None = None


class Modal:
    """The server, its state, and the worker."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.folder, self.environ, self.checkout = folder, environ, folder / "checkout"
        """`environ` has the variables of image and secret, which every container gets; none are the caller's."""
        for name in SOURCES:  # a copy without .venv, which Modal would search for the files that the image copies
            self.checkout.mkdir(exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.checkout / name)
        self.requests: list[tuple[str, Any]] = []
        self.functions: dict[str, Any] = {}
        self.app_secret: dict[str, str] = {}
        """The contents of the app's own secret: the settings of a deployed app, nothing secret."""
        self.inputs: list[Input] = []
        self.losses: list[Loss] = []
        self.has_gpus = True
        self.containers: list[tuple[str, subprocess.Popen[bytes]]] = []
        """The containers that were started, each with its function."""
        self._ended, self._worker = asyncio.Event(), asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        server = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
        self.url = f"http://127.0.0.1:{server}"
        self.token = {"MODAL_TOKEN_ID": "ak-test", "MODAL_TOKEN_SECRET": "as-test", "MODAL_SERVER_URL": self.url}
        files = ThreadingHTTPServer(("127.0.0.1", 0), type("Files", (_Files,), {"folder": folder}))
        threading.Thread(target=files.serve_forever, daemon=True).start()
        self.files_url = f"http://127.0.0.1:{files.server_address[1]}"

    async def _serve(self) -> int:
        self._server = Server([self])
        await self._server.start("127.0.0.1", 0)
        return self._server._server.sockets[0].getsockname()[1]

    def run(self, command: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run `modal run modal_app.py::COMMAND` or `modal deploy modal_app.py` with only these words and variables."""
        self.requests.clear()
        app = str(self.checkout / "modal_app.py")
        start = ["deploy", app] if command == "deploy" else ["run", f"{app}::{command}" if command else app]
        return caller(self.folder, *start, *words, **{**self.token, **environ})

    def requested(self, name: str) -> list[Any]:
        """Return the requests with this name since the last command."""
        return [request for called, request in self.requests if called == name]

    def trigger(self, function: str) -> Any:
        """Call a deployed function without arguments, as a schedule does, and return its result."""
        new = Input(f"in-{function}", f"fc-{function}", f"fu-{function}", 0, api.FunctionInput())
        self.inputs.append(new)
        asyncio.run_coroutine_threadsafe(self._work(new.function), self._loop).result(timeout=60)
        assert new.output[1].result.status == DONE, new.output[1].result.exception
        return deserialize_data_format(new.output[1].result.data, new.output[1].data_format, None)

    def committed(self, volume: str) -> Path:
        """Return the folder with the committed state of a volume."""
        path = self.folder / "volumes" / volume
        path.mkdir(parents=True, exist_ok=True)
        return path

    # --- the protocol -------------------------------------------------------------------------

    def __mapping__(self) -> dict[str, Handler]:
        service = api.DESCRIPTOR.services_by_name["ModalClient"]
        return {f"/{service.full_name}/{method.name}": self._handler(method) for method in service.methods}

    def _handler(self, method: Any) -> Handler:
        async def handle(stream: Stream[Any, Any]) -> None:
            request = await stream.recv_message()
            self.requests.append((method.name, request))
            answer: Callable[[Any], Any] | None = getattr(self, method.name, None)
            if answer is None:
                raise GRPCError(Status.UNIMPLEMENTED, f"the local server does not implement {method.name}")
            if method.server_streaming:
                async for message in answer(request):
                    await stream.send_message(message)
            else:
                await stream.send_message(await answer(request))

        kinds = {False: Cardinality.UNARY_UNARY, True: Cardinality.UNARY_STREAM}
        types = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
        return Handler(handle, kinds[method.server_streaming], *types)

    async def AppCreate(self, request: Any) -> Any:
        self._ended.clear()
        return api.AppCreateResponse(app_id="ap-1", app_page_url="https://modal.test/ap-1")

    async def AppGetByDeploymentName(self, request: Any) -> Any:
        return api.AppGetByDeploymentNameResponse()

    async def EnvironmentGetOrCreate(self, request: Any) -> Any:
        settings = api.EnvironmentSettings(image_builder_version="2025.06")
        metadata = api.EnvironmentMetadata(name="main", settings=settings)
        return api.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    async def AppHeartbeat(self, request: Any) -> Any:
        return Empty()

    async def AppGetLogs(self, request: Any) -> AsyncIterator[Any]:
        await self._ended.wait()
        yield api.TaskLogsBatch(app_done=True)

    async def AppPublish(self, request: Any) -> Any:
        return api.AppPublishResponse(url="https://modal.test/tagger-job")

    async def AppClientDisconnect(self, request: Any) -> Any:
        self._ended.set()
        return Empty()

    async def SecretGetOrCreate(self, request: Any) -> Any:
        self.app_secret = self.app_secret if request.deployment_name else dict(request.env_dict)
        return api.SecretGetOrCreateResponse(secret_id=f"st-{request.deployment_name or 'given'}")

    async def VolumeGetOrCreate(self, request: Any) -> Any:
        metadata = api.VolumeMetadata(name=request.deployment_name)
        return api.VolumeGetOrCreateResponse(volume_id=f"vo-{request.deployment_name}", metadata=metadata)

    async def MountGetOrCreate(self, request: Any) -> Any:
        return api.MountGetOrCreateResponse(mount_id=f"mo-{len(self.requests)}")

    async def MountBatchedCheckExistence(self, request: Any) -> Any:
        return api.MountBatchedCheckExistenceResponse()

    async def ImageGetOrCreate(self, request: Any) -> Any:
        result = api.GenericResult(status=DONE)
        return api.ImageGetOrCreateResponse(image_id=f"im-{len(self.requests)}", result=result)

    async def FunctionPrecreate(self, request: Any) -> Any:
        function = f"fu-{request.function_name}"
        return api.FunctionPrecreateResponse(function_id=function, handle_metadata=self._about(request.function_name))

    async def FunctionCreate(self, request: Any) -> Any:
        data = request.function_data
        definition = data.ranked_functions[0].function if data.ranked_functions else request.function
        function = f"fu-{definition.function_name}"
        self.functions[function] = definition
        about = self._about(definition.function_name)
        return api.FunctionCreateResponse(function_id=function, handle_metadata=about, function_data=data)

    def _about(self, name: str) -> Any:
        return api.FunctionHandleMetadata(
            function_name=name,
            function_type=api.Function.FUNCTION_TYPE_FUNCTION,
            definition_id=f"de-{name}",
            supported_input_formats=[api.DATA_FORMAT_PICKLE, api.DATA_FORMAT_CBOR],
            supported_output_formats=[api.DATA_FORMAT_PICKLE, api.DATA_FORMAT_CBOR],
        )

    async def FunctionMap(self, request: Any) -> Any:
        call = f"fc-{len({each.call for each in self.inputs}) + 1}"
        items = self._put(call, request.function_id, request.pipelined_inputs)
        return api.FunctionMapResponse(function_call_id=call, function_call_jwt=call, pipelined_inputs=items)

    async def FunctionPutInputs(self, request: Any) -> Any:
        items = self._put(request.function_call_id, request.function_id, request.inputs)
        return api.FunctionPutInputsResponse(inputs=items)

    def _put(self, call: str, function: str, items: Any) -> list[Any]:
        new = [Input(f"in-{call}-{item.idx}", call, function, item.idx, item.input) for item in items]
        self.inputs += new
        if new and self.has_gpus:
            self._task = self._loop.create_task(self._work(function))
        return [api.FunctionPutInputsResponseItem(idx=i.index, input_id=i.id, input_jwt=i.id) for i in new]

    async def FunctionGetOutputs(self, request: Any) -> Any:
        seen = int(request.last_entry_id.partition("-")[0] or 0)
        for _ in range(int(request.timeout / 0.02) + 1):
            done = [each for each in self.inputs if each.call == request.function_call_id and each.output is not None]
            if len(done) > seen or request.timeout == 0:
                break
            await asyncio.sleep(0.02)
        done.sort(key=lambda each: each.output[0])
        outputs = [
            api.FunctionGetOutputsItem(
                result=each.output[1].result, data_format=each.output[1].data_format, idx=each.index, input_id=each.id
            )
            for each in done[seen:]
        ]
        return api.FunctionGetOutputsResponse(
            outputs=outputs, last_entry_id=f"{len(done)}-0", idxs=[each.index for each in done[seen:]]
        )

    async def VolumeListFiles(self, request: Any) -> AsyncIterator[Any]:
        root = self.committed(request.volume_id)
        start = root / request.path.strip("/")
        kinds = {True: api.FileEntry.DIRECTORY, False: api.FileEntry.FILE}
        yield api.VolumeListFilesResponse(
            entries=[
                api.FileEntry(path=str(path.relative_to(root)), type=kinds[path.is_dir()], size=path.stat().st_size)
                for path in sorted(start.rglob("*") if request.recursive else start.iterdir())
            ]
        )

    VolumeListFiles2 = VolumeListFiles

    async def VolumeGetFile2(self, request: Any) -> Any:
        file = self.committed(request.volume_id) / request.path
        if not file.is_file():
            raise GRPCError(Status.NOT_FOUND, f"no file {request.path}")
        size = file.stat().st_size
        urls = [f"{self.files_url}/{file.relative_to(self.folder)}"] if size else []
        return api.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)

    # --- containers ---------------------------------------------------------------------------

    async def ContainerHello(self, request: Any) -> Any:
        return Empty()

    async def ContainerHeartbeat(self, request: Any) -> Any:
        return api.ContainerHeartbeatResponse()

    async def FunctionGetInputs(self, request: Any) -> Any:
        waiting = [each for each in self.inputs if each.function == request.function_id and each.output is None]
        if not waiting:
            return api.FunctionGetInputsResponse(inputs=[api.FunctionGetInputsItem(kill_switch=True)])
        given = waiting[0]
        self._lose(lambda loss: loss.input == given.id)
        item = api.FunctionGetInputsItem(input_id=given.id, input=given.content, function_call_id=given.call)
        return api.FunctionGetInputsResponse(inputs=[item])

    async def FunctionPutOutputs(self, request: Any) -> Any:
        for item in request.outputs:
            if item.result.status != CANCELLED:  # what a container sends when its time is up: retried
                [given] = [each for each in self.inputs if each.id == item.input_id]
                given.output = (sum(each.output is not None for each in self.inputs), item)
        return Empty()

    async def TaskResult(self, request: Any) -> Any:
        return Empty()

    async def VolumeCommit(self, request: Any) -> Any:
        committed, mounted = self.committed(request.volume_id), self._mount(request.volume_id)
        shutil.rmtree(committed)
        shutil.copytree(mounted, committed, symlinks=True)
        if self._lose(lambda loss: loss.folder is not None and any(committed.glob(loss.folder))):
            await asyncio.sleep(0.5)  # Modal's client loses an exception that arrives together with a response
        return api.VolumeCommitResponse(skip_reload=True)

    async def VolumeReload(self, request: Any) -> Any:
        return Empty()  # one container runs at a time, with the volume as last committed

    def _mount(self, volume: str) -> Path:
        return self.folder / "mounted" / volume

    def _lose(self, is_due: Callable[[Loss], bool]) -> bool:
        due = [loss for loss in self.losses if is_due(loss)]
        for loss in due:
            self.losses.remove(loss)
            self.containers[-1][1].send_signal(loss.signal)
        return bool(due)

    async def _work(self, function: str) -> None:
        """Start containers until every input has an output; the next one gets the input of a killed one."""
        async with self._worker:
            while any(each.function == function and each.output is None for each in self.inputs):
                assert len(self.containers) < 20, "the containers make no progress"
                container = self._start(function)
                self.containers.append((function, container))
                await self._loop.run_in_executor(None, container.wait)

    def _start(self, function: str) -> subprocess.Popen[bytes]:
        definition = self.functions[function]
        environ = dict(self.environ)
        for mount, variable in (("/runs", "TAGGER_RUN_DIR"), ("/cache", "HF_HOME")):
            [volume] = [each.volume_id for each in definition.volume_mounts if each.mount_path == mount]
            shutil.rmtree(self._mount(volume), ignore_errors=True)
            shutil.copytree(self.committed(volume), self._mount(volume), symlinks=True)
            environ[variable] = str(self._mount(volume))
        environ |= self.app_secret if "st-given" in definition.secret_ids else {}
        objects = [
            api.Object(object_id=each, function_handle_metadata=self._about(each.removeprefix("fu-")))
            for each in self.functions
        ]
        objects += [api.Object(object_id=each.object_id) for each in definition.object_dependencies]
        names = {each.removeprefix("fu-"): each for each in self.functions}
        arguments = api.ContainerArguments(
            task_id=f"ta-{len(self.containers)}",
            function_id=function,
            app_id="ap-1",
            function_def=definition,
            app_layout=api.AppLayout(objects=objects, function_ids=names),
            environment_name="main",
        )
        path = self.folder / "arguments"
        path.write_bytes(arguments.SerializeToString())
        environ |= {
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(path),
            "MODAL_SERVER_URL": self.url,
            "PYTHONPATH": str(self.checkout),
        }
        environ |= {"MODAL_TASK_ID": arguments.task_id, "MODAL_IS_REMOTE": "1", "PATH": os.environ["PATH"]}
        command = [sys.executable, "-m", "modal._container_entrypoint"]
        with (self.folder / f"{arguments.task_id}.log").open("wb") as log:
            return subprocess.Popen(command, env=environ, cwd=self.folder, stdout=log, stderr=log)


class _Files(SimpleHTTPRequestHandler):
    """Serve the files of the volumes."""

    folder: Path

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(self.folder))

    def log_message(self, *arguments: Any) -> None:
        pass


def caller(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Modal's command line as on a machine where nobody is logged in."""
    here = {"PATH": os.environ["PATH"], "HOME": str(folder), "MODAL_CONFIG_PATH": str(folder / "none.toml")}
    return subprocess.run(
        [MODAL, *words], env={**here, **environ}, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
