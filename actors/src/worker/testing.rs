//! What tests of workers and of their supervisors share: an engine process that does as a test says, an actor that
//! keeps what it is told, and waiting for conditions.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use understudy_engine_core::codec::{self, FrameReader};
use understudy_engine_core::frame::{
    AttemptId, ENGINE_PROTOCOL, EngineCommand, EngineEvent, EngineInfo, OutputToken, StepToken,
};

use super::WorkerLimits;
use super::process::EngineSpec;

/// No condition in these tests takes longer, even on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(2);

/// Long enough for none of them to pass in a test.
pub(crate) const LIMITS: WorkerLimits = WorkerLimits {
    silence: Duration::from_secs(60),
    stall: Duration::from_secs(60),
    start: Duration::from_secs(60),
};

/// Waits until `condition` gives something.
pub(crate) async fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// A real process in an engine's place; see `testing/engine.sh`.
pub(crate) struct StandIn {
    directory: PathBuf,
    /// Open for reading too, so that opening it waits for nobody.
    events: File,
}

impl StandIn {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("understudy-stand-in-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir_all(&directory).unwrap();
        let events = directory.join("events");
        fs::remove_file(&events).ok();
        nix::unistd::mkfifo(&events, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        fs::write(directory.join("exit"), "0").unwrap();
        let events = OpenOptions::new().read(true).write(true).open(events);
        Self {
            directory,
            events: events.unwrap(),
        }
    }

    /// How to start it.
    pub(crate) fn spec(&self) -> Arc<EngineSpec> {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        Arc::new(EngineSpec {
            program: sources.join("worker/testing/engine.sh"),
            model_dir: self.directory.clone(),
            dtype: "f32".into(),
            device: "cpu".into(),
            numerics: "exact".into(),
            quantization: "none".into(),
            kv_dtype: "auto".into(),
            kv_memory: "0.5".into(),
            threads: 1,
            max_sequences: 4,
            max_waiting: 4,
            step_token_budget: 64,
            context_length: None,
        })
    }

    pub(crate) fn say(&mut self, event: &EngineEvent) {
        self.events
            .write_all(&codec::encode(event).unwrap())
            .unwrap();
    }

    pub(crate) fn get_ready(&mut self) {
        self.say(&EngineEvent::Ready(info()));
    }

    /// Lets the running one end.
    pub(crate) async fn exit(&mut self, status: i32) {
        fs::write(self.directory.join("exit"), status.to_string()).unwrap();
        // It has to have the pipe open: its readers see the end as soon as nobody holds it open for writing, and whoever
        // opens it afterwards waits for ever.
        let listens = self.directory.join("listens");
        until("an engine that listens", || listens.exists().then_some(())).await;
        self.events = File::open("/dev/null").unwrap();
    }

    /// Every command so far.
    pub(crate) fn commands(&self) -> Vec<EngineCommand> {
        let Ok(file) = File::open(self.directory.join("commands")) else {
            return Vec::new();
        };
        let mut reader = FrameReader::new(file);
        // The last one may not be whole yet.
        std::iter::from_fn(|| reader.read().ok().flatten()).collect()
    }

    /// Waits until it has got this command.
    pub(crate) async fn has_got(&self, command: EngineCommand) {
        let what = format!("{command:?}");
        until(&what, || self.commands().contains(&command).then_some(())).await;
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).ok();
    }
}

pub(crate) fn info() -> EngineInfo {
    EngineInfo {
        protocol: ENGINE_PROTOCOL,
        pid: 1,
        architecture: "StandIn".into(),
        context_length: 100,
        vocab_size: 50,
        eos_token_ids: vec![],
        device: "cpu".into(),
        dtype: "f32".into(),
        max_sequences: 4,
        kv_capacity_tokens: 400,
        fingerprint: "f".into(),
        load_ms: 1,
    }
}

pub(crate) fn token(attempt: AttemptId, position: u32) -> StepToken {
    StepToken {
        attempt,
        position,
        token: OutputToken {
            id: 7,
            logprob: -0.5,
            top: vec![],
        },
        finish: None,
        waited_ms: None,
    }
}

/// An actor that keeps what it is told for a test.
pub(crate) struct Probe<M>(PhantomData<fn(M)>);

impl<M: ractor::Message> Probe<M> {
    pub(crate) async fn spawn() -> (ActorRef<M>, UnboundedReceiver<M>) {
        let (keep, kept) = unbounded_channel();
        let (actor, _) = Actor::spawn(None, Self(PhantomData), keep).await.unwrap();
        (actor, kept)
    }
}

impl<M: ractor::Message> Actor for Probe<M> {
    type Msg = M;
    type State = UnboundedSender<M>;
    type Arguments = UnboundedSender<M>;

    async fn pre_start(
        &self,
        _me: ActorRef<M>,
        keep: UnboundedSender<M>,
    ) -> Result<UnboundedSender<M>, ActorProcessingErr> {
        Ok(keep)
    }

    async fn handle(
        &self,
        _me: ActorRef<M>,
        message: M,
        keep: &mut UnboundedSender<M>,
    ) -> Result<(), ActorProcessingErr> {
        // A test that has ended looks at nothing any more.
        keep.send(message).ok();
        Ok(())
    }
}
