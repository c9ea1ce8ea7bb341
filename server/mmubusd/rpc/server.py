"""A server's life: start, serve, drain, stop.

    start   frames, cores, listeners, health SERVING
    drain   health NOT_SERVING (all but liveness) → new work refused → sessions told → open operations end, in a bound
    stop    streams end with UNAVAILABLE, frames go

A broken invariant cuts this short: the log says which, and the process ends with status 70.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from mmu.v1 import address_space_pb2, authority_pb2, device_pb2, inspection_pb2, session_pb2
from structlog.typing import FilteringBoundLogger

from mmubusd.rpc.address_space import AddressSpaceService
from mmubusd.rpc.authority import Authority
from mmubusd.rpc.bystanders import Bystanders, Health, Reflection
from mmubusd.rpc.config import ConfigError, Settings, split_address
from mmubusd.rpc.device import DeviceService
from mmubusd.rpc.driver import Driver
from mmubusd.rpc.errors import Alarm
from mmubusd.rpc.exposition import Exposition
from mmubusd.rpc.files import FileService
from mmubusd.rpc.grants import AuthorityService
from mmubusd.rpc.identity import Identities, SecurityFileError
from mmubusd.rpc.inspection import InspectionService
from mmubusd.rpc.khugepaged import Khugepaged
from mmubusd.rpc.lag import Lag
from mmubusd.rpc.lane import Lanes
from mmubusd.rpc.log import Level, make_log
from mmubusd.rpc.machine import Machine, limits_of
from mmubusd.rpc.methods import handlers
from mmubusd.rpc.metrics import Metrics
from mmubusd.rpc.ownership import keep_ownership
from mmubusd.rpc.peer_credentials import Relay, user_ids
from mmubusd.rpc.record import Recorder
from mmubusd.rpc.reload import Watch, read_security, reload
from mmubusd.rpc.socket_file import SocketFile
from mmubusd.rpc.stream import SessionService
from mmubusd.rpc.tls import TlsFiles, server_credentials
from mmubusd.rpc.tracing import Tracing
from mmubusd.rpc.transport import server_options

__all__ = ["LIVENESS", "Server"]

LIVENESS = "mmubus.liveness"
"""The health service's name that a liveness probe asks for: it does not flip while the server drains."""
HEALTH: ServiceDescriptor = health_pb2.DESCRIPTOR.services_by_name["Health"]  # type: ignore[assignment]
REFLECTION: ServiceDescriptor = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]  # type: ignore[assignment]
STOP_GRACE_S = 0.5


class Server:
    """One server. Start it on a running loop; stop it on the same."""

    def __init__(
        self,
        settings: Settings,
        log: FilteringBoundLogger | None = None,
        again: Callable[[], Settings] | None = None,
    ) -> None:
        """Args: again: reads the configuration once more, after a signal or when its file has changed."""
        self.settings = settings
        self._again = again
        self._watch: Watch | None = None
        self._khugepaged: Khugepaged | None = None
        self._level = Level(settings.log_level)
        self.log = log if log is not None else make_log(self._level, settings.log_format)
        self._relays: list[Relay] = []
        self._sockets: list[SocketFile] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._lanes: Lanes | None = None
        self.metrics: Exposition | None = None
        self.addresses: tuple[str, ...] = ()
        self.recorder: Recorder | None = None

    async def start(self) -> tuple[str, ...]:
        """Make the machine and listen.

        Returns: the addresses as clients write them, with the ports that were bound.
        Raises: OSError when an address is in use or cannot be bound, SecurityFileError when a file of tokens, roles or
            certificates cannot be used, StateError when the state cannot; nothing listens then.
        """
        settings = self.settings
        self.alarm = Alarm()
        self._server = grpc.aio.server(
            options=server_options(settings.message_bytes_max), maximum_concurrent_rpcs=settings.calls_max
        )
        self.machine = Machine(settings, self.alarm, self.log)
        self.memory, self.bus = self.machine.core.memory, self.machine.core
        try:
            authority = self._authority()
            self.driver = Driver(self.memory, self.bus, settings, self.alarm, self.log, authority)
            self.driver.commits = self.machine.commits
            keep_ownership(authority, self.bus)
            self.driver.quotas.limit_memory()
            if settings.traces:
                self.driver.tracing = Tracing(self.bus)
                self.driver.tracing.now = self.driver.now
            if settings.lane:
                sockets = [address[5:] for address in settings.listen if address.startswith("unix:")]
                self._lanes = Lanes(settings.message_bytes_max, sockets[0] if sockets else "", self.machine.commits)
                await self._lanes.start()
            if settings.record is not None:
                self.recorder = Recorder(self.bus, settings.record)
            self._add_services()
            credentials = self._credentials()
            for address in settings.listen:
                self.addresses += (await self._listen(address, credentials),)
            await self._server.start()
            await self._expose()
        except BaseException:
            await self._close_doors(0)
            if self.machine.commits is not None:
                await self.machine.commits.close()
            self._tidy()
            raise
        self.lag = Lag(settings.health_lag_s, self._lagging)
        self._health.set((*self._names, "", LIVENESS), health_pb2.HealthCheckResponse.SERVING)
        self._watch_files()
        if settings.khugepaged_scan_sleep_s:
            self._khugepaged = Khugepaged(self.driver, self.alarm)
        self.driver.pump()  # what a recovered state has to do
        self.log.info(
            "started", addresses=self.addresses, frames=settings.frames_nr, epoch=self.bus.epoch,
            recovered=self.machine.recovered,
        )  # fmt: skip
        return self.addresses

    def _add_services(self) -> None:
        frames_path = self.machine.store.path
        driver = self.driver
        services = {
            address_space_pb2.DESCRIPTOR.services_by_name["AddressSpaceService"]: AddressSpaceService(
                driver, self._lanes
            ),
            address_space_pb2.DESCRIPTOR.services_by_name["FileService"]: FileService(driver),
            session_pb2.DESCRIPTOR.services_by_name["SessionService"]: SessionService(driver, frames_path, self._lanes),
            device_pb2.DESCRIPTOR.services_by_name["DeviceService"]: DeviceService(driver, self._lanes),
            inspection_pb2.DESCRIPTOR.services_by_name["InspectionService"]: InspectionService(driver),
            authority_pb2.DESCRIPTOR.services_by_name["AuthorityService"]: AuthorityService(driver),
        }
        self._names = tuple(service.full_name for service in services)
        self._server.add_generic_rpc_handlers(
            tuple(
                handlers(service, implementation, self.alarm, driver.quotas, driver.tally, driver.commits)
                for service, implementation in services.items()
            )
        )
        self._health = Health()
        bystanders = Bystanders(self.settings.calls_max)
        offered = [handlers(HEALTH, self._health, self.alarm, bystanders, driver.tally)]
        if self.settings.reflection:
            shown = Reflection((*self._names, HEALTH.full_name, REFLECTION.full_name))
            offered.append(handlers(REFLECTION, shown, self.alarm, bystanders, driver.tally))
        self._server.add_generic_rpc_handlers(tuple(offered))

    def _authority(self) -> Authority:
        """Who may do what, as configured. Raises: SecurityFileError."""
        settings = self.settings
        if not settings.authenticates:
            return Authority(self.memory)
        tokens, grants = read_security(settings)
        if settings.unix_users:
            self._directory = tempfile.TemporaryDirectory(prefix="mmubusd-")
        directory = self._directory.name if self._directory is not None else ""
        identities = Identities(tokens, certificates=settings.tls_client_ca is not None, peers_directory=directory)
        return Authority(self.memory, identities, grants)

    def _credentials(self) -> grpc.ServerCredentials | None:
        """TLS for host:port, or None. Raises: SecurityFileError."""
        settings = self.settings
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        loop = asyncio.get_running_loop()

        def changed(error: SecurityFileError | None) -> None:  # on a thread of gRPC's
            loop.call_soon_threadsafe(self._certificates_changed, error)

        return server_credentials(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca), changed)

    def _certificates_changed(self, error: SecurityFileError | None) -> None:
        if error is None:
            self.log.info("new certificates are in use")
        else:
            self.log.error("new certificates cannot be used; those before are", because=str(error))

    async def _listen(self, address: str, credentials: grpc.ServerCredentials | None) -> str:
        """Bind one address: a Unix socket for this user or with a relay for several, host:port with TLS or without."""
        host, port = split_address(address)
        try:
            if host == "unix":
                door = SocketFile(Path(port))
                if self._directory is not None:
                    await self._listen_for_users(door, self._directory.name)
                else:
                    self._bind_private(door.bound)
                    door.settle()
                    self._sockets.append(door)
                return address
            if credentials is not None:
                bound = self._server.add_secure_port(address, credentials)
            else:
                bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"{address} cannot be listened on: it is in use or not ours") from error
        return f"{address.rpartition(':')[0]}:{bound}"

    def _bind_private(self, path: Path) -> None:
        """A socket that the kernel lets this user connect to, and nobody else (but root)."""
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        finally:
            os.umask(before)

    async def _listen_for_users(self, file: SocketFile, directory: str) -> None:
        inner = f"{directory}/inner-{len(self._relays)}.sock"
        self._bind_private(Path(inner))
        allowed = user_ids(self.settings.unix_users)
        relay = Relay(
            file, inner, directory, allowed, lambda uid: self.log.warning("a Unix peer was turned away", uid=uid)
        )
        await relay.start()
        self._relays.append(relay)

    async def _expose(self) -> None:
        """Offer the metrics, if that was asked for. Raises: OSError."""
        if self.settings.metrics_listen is not None:
            self.metrics = Exposition(Metrics(self.driver, lambda: self.lag))
            await self.metrics.start(*split_address(self.settings.metrics_listen))

    def _watch_files(self) -> None:
        settings = self.settings
        config = settings.config if self._again is not None else None
        paths = [path for path in (config, settings.tokens, settings.roles) if path is not None]
        if paths and settings.watch_s:
            self._watch = Watch(paths, settings.watch_s, self._files_changed)

    def _files_changed(self, paths: list[Path]) -> None:
        self.log.info("files have changed", files=[str(path) for path in paths])
        try:
            self.read_again()
        except Exception as error:  # nobody is above a timer
            self.alarm.ring(error)

    def read_again(self) -> bool:
        """Read configuration, tokens and roles again. Returns: whether they could be used; if not, all is as before."""
        try:
            settings = self._again() if self._again is not None else self.settings
        except ConfigError as error:
            self.log.error("the configuration is not read again", because=str(error))
            return False
        return reload(self, settings)

    def _lagging(self, over: bool) -> None:
        if over:
            self.log.warning("the loop lags: NOT_SERVING", lag_s=round(self.lag.last_s, 3), bound_s=self.lag.bound_s)
        self._tell_health()

    def _tell_health(self) -> None:
        """SERVING only while new work is taken and the loop keeps up; liveness is not touched."""
        well = not self.driver.draining and not self.lag.over
        status = health_pb2.HealthCheckResponse.SERVING if well else health_pb2.HealthCheckResponse.NOT_SERVING
        self._health.set((*self._names, ""), status)

    def apply(self, settings: Settings) -> None:
        """Go on with changed settings; see `reload.LIVE` for those that matter to a running server."""
        self.settings = self.driver.settings = settings
        self._level.change(settings.log_level)
        self.lag.bound_s = settings.health_lag_s
        self.bus.change_limits(limits_of(settings))
        self.driver.quotas.limit_memory()

    async def drain(self) -> bool:
        """Take no new work, tell every session, let open operations end.

        Returns: whether they all did within drain_s.
        """
        self.driver.draining = True
        self._tell_health()
        self.log.info("draining", seconds=self.settings.drain_s)
        done = await self.driver.drain(self.settings.drain_s)
        if not done:
            self.log.warning("operations were still open when the time for draining was up")
        return done

    def _tidy(self) -> None:
        """Sockets and frames go."""
        if self._lanes is not None:
            self._lanes.stop()
        if self._directory is not None:
            self._directory.cleanup()
        for file in self._sockets:
            file.remove()
        self.machine.close()

    async def _close_doors(self, grace_s: float) -> None:
        """Nobody comes in any more, and who is in goes."""
        if self._watch is not None:
            self._watch.close()
        if self._khugepaged is not None:
            await self._khugepaged.close()
        for relay in self._relays:
            await relay.stop()
        if self.metrics is not None:
            await self.metrics.stop()
        await self._server.stop(grace_s)

    async def stop(self) -> None:
        """End every stream and give everything back."""
        await self._close_doors(STOP_GRACE_S)
        self.lag.close()
        self.driver.close()
        if self.machine.commits is not None:
            await self.machine.commits.close()
        if self.recorder is not None:
            self.recorder.close()
        if self.driver.tracing is not None:
            await asyncio.to_thread(self.driver.tracing.close)
        self._tidy()
        self.log.info("stopped")
