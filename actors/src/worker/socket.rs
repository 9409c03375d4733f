//! The engine's socket: frames in, commands out, each in a task of its own.

use std::sync::Arc;

use ractor::ActorRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc};
use understudy_engine_core::codec::{CodecError, FrameDecoder};
use understudy_engine_core::frame::EngineEvent;

use super::WorkerMsg;

/// Engine frames that may wait in the worker's mailbox; the engine's socket fills up behind them.
const MAX_FRAMES_IN_MAILBOX: usize = 1024;

/// Bytes read at a time.
const READ_BYTES: usize = 64 * 1024;

/// Reads the engine's socket until it ends, and says how it did.
pub async fn read_events(socket: OwnedReadHalf, worker: ActorRef<WorkerMsg>) {
    let end = match pass_on_events(socket, &worker).await {
        Ok(()) => WorkerMsg::EngineClosed,
        Err(error) => WorkerMsg::EngineGarbled(error.to_string()),
    };
    // A worker that is gone needs no news of its engine.
    worker.cast(end).ok();
}

/// Returns when the socket closes, or the worker is gone.
async fn pass_on_events(
    mut socket: OwnedReadHalf,
    worker: &ActorRef<WorkerMsg>,
) -> Result<(), CodecError> {
    let permits = Arc::new(Semaphore::new(MAX_FRAMES_IN_MAILBOX));
    let mut decoder = FrameDecoder::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = match socket.read(&mut buffer).await {
            Ok(0) | Err(_) => return Ok(()),
            Ok(read) => read,
        };
        decoder.feed(&buffer[..read])?;
        while let Some(event) = decoder.next_frame::<EngineEvent>()? {
            let Ok(permit) = permits.clone().acquire_owned().await else {
                return Ok(());
            };
            if worker.cast(WorkerMsg::Engine(event, permit)).is_err() {
                return Ok(());
            }
        }
    }
}

/// Writes the frames of commands until the worker drops its end or the engine stops reading for good.
pub async fn write_commands(mut socket: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        if socket.write_all(&frame).await.is_err() {
            return;
        }
    }
}
