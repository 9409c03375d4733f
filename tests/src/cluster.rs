//! A cluster of real processes, in a directory of its own.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use understudy_client::{Client, ClusterStatus, Options};
use understudy_protocol::message::{ReplicaStatus, WorkerStatus};

use crate::ports;
use crate::programs::{self, Engine};
use crate::wait::until;

/// How long a cluster may take to be ready.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// Describes a cluster; every part has a default.
#[derive(Debug, Clone)]
pub struct TestClusterBuilder {
    engine: Engine,
    replicas: u32,
    /// Name and roles of each node.
    nodes: Vec<(String, &'static str)>,
    settings: String,
    model_settings: String,
    model_dir: PathBuf,
    environment: Vec<(String, String)>,
}

impl TestClusterBuilder {
    /// Two nodes, `a` with both roles and `b` as host, and two replicas of the demo model, by name `demo`.
    pub fn new(engine: Engine) -> Self {
        Self {
            engine,
            replicas: 2,
            nodes: vec![
                ("a".into(), r#"["gateway", "host"]"#),
                ("b".into(), r#"["host"]"#),
            ],
            settings: String::new(),
            model_settings: String::new(),
            model_dir: programs::repository().join("models/demo"),
            environment: Vec::new(),
        }
    }

    pub fn replicas(mut self, replicas: u32) -> Self {
        self.replicas = replicas;
        self
    }

    /// Only node `a`.
    pub fn one_node(mut self) -> Self {
        self.nodes.truncate(1);
        self
    }

    /// Node `a` is gateway only, node `b` host only.
    pub fn gateway_and_host(mut self) -> Self {
        self.nodes = vec![("a".into(), r#"["gateway"]"#), ("b".into(), r#"["host"]"#)];
        self
    }

    /// TOML of further sections.
    pub fn settings(mut self, toml: &str) -> Self {
        self.settings.push_str(toml);
        self.settings.push('\n');
        self
    }

    /// TOML keys of the model.
    pub fn model_settings(mut self, toml: &str) -> Self {
        self.model_settings.push_str(toml);
        self.model_settings.push('\n');
        self
    }

    pub fn model_dir(mut self, path: &Path) -> Self {
        self.model_dir = path.to_owned();
        self
    }

    /// An environment variable of every node, and so of every engine.
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.environment.push((name.to_owned(), value.to_string()));
        self
    }

    /// A fake engine's step takes this long.
    pub fn step_ms(self, ms: u64) -> Self {
        self.env("UNDERSTUDY_FAKE_STEP_DELAY_US", ms * 1000)
    }

    /// Starts every node. `None` if the engine is not there, which is said on standard error.
    pub fn start(self) -> Option<TestCluster> {
        let mut cluster = self.prepare()?;
        for node in 0..cluster.builder.nodes.len() {
            cluster.start_node(node);
        }
        Some(cluster)
    }

    /// Everything but the start of the nodes. `None` if the engine is not there, which is said on standard error.
    pub fn prepare(self) -> Option<TestCluster> {
        let engine = programs::engine(self.engine)?;
        let turn = Turn::take();
        let directory = fresh_directory();
        let ports: Vec<[u16; 3]> = self.nodes.iter().map(|_| ports::free()).collect();
        let config = directory.join("cluster.toml");
        std::fs::write(&config, self.toml(&ports)).expect("the configuration can be written");
        write_cookie(&directory.join("cookie"));
        let nodes = self.nodes.iter().map(|_| None).collect();
        Some(TestCluster {
            engine,
            builder: self,
            directory,
            config,
            ports,
            nodes,
            _turn: turn,
        })
    }

    /// Starts every node, and waits until every replica is ready.
    pub async fn start_ready(self) -> Option<TestCluster> {
        let cluster = self.start()?;
        cluster.wait_ready().await;
        Some(cluster)
    }

    fn toml(&self, ports: &[[u16; 3]]) -> String {
        let mut toml =
            String::from("[cluster]\nname = \"test\"\ncookie_file = \"cookie\"\nrun_dir = \".\"\n");
        for ((name, roles), [cluster, client, metrics]) in self.nodes.iter().zip(ports) {
            write!(toml, "[[node]]\nname = \"{name}\"\nroles = {roles}\ndevices = [\"cpu\"]\ncluster_port = {cluster}\nmetrics_port = {metrics}\n")
                .expect("memory");
            if roles.contains("gateway") {
                writeln!(toml, "client_port = {client}").expect("memory");
            }
        }
        let (path, replicas, more) = (
            self.model_dir.display(),
            self.replicas,
            &self.model_settings,
        );
        write!(
            toml,
            "[[model]]\nname = \"demo\"\npath = \"{path}\"\nreplicas = {replicas}\n{more}\n{}",
            self.settings
        )
        .expect("memory");
        toml
    }
}

/// A running cluster. Dropping it kills every process of it.
#[derive(Debug)]
pub struct TestCluster {
    engine: PathBuf,
    builder: TestClusterBuilder,
    directory: PathBuf,
    config: PathBuf,
    /// Cluster, client and metrics port of each node.
    ports: Vec<[u16; 3]>,
    nodes: Vec<Option<Child>>,
    _turn: Turn,
}

/// One of [`Turn::AT_ONCE`] permissions to run a cluster: more of them at once would measure the machine's patience.
#[derive(Debug)]
struct Turn;

impl Turn {
    const AT_ONCE: usize = 2;
    fn state() -> &'static (Mutex<usize>, Condvar) {
        static STATE: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());
        &STATE
    }

    fn take() -> Self {
        let (count, freed) = Self::state();
        let mut running = count.lock().unwrap_or_else(PoisonError::into_inner);
        while *running >= Self::AT_ONCE {
            running = freed.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
        *running += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (count, freed) = Self::state();
        *count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        freed.notify_one();
    }
}

impl TestCluster {
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Cluster, client and metrics port of a node.
    pub fn ports(&self, node: usize) -> [u16; 3] {
        self.ports[node]
    }

    /// `host:port` of the gateway on node `a`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0][1])
    }

    /// Where node number `node` serves its metrics.
    pub fn metrics_address(&self, node: usize) -> String {
        format!("127.0.0.1:{}", self.ports[node][2])
    }

    /// A new connection to the gateway.
    pub fn client(&self) -> Client {
        Client::new([self.address()], Options::default()).expect("valid options")
    }

    /// Pid of a node's process.
    pub fn node_pid(&self, node: usize) -> u32 {
        self.nodes[node].as_ref().expect("the node runs").id()
    }

    pub async fn status(&self) -> Option<ClusterStatus> {
        let options = Options {
            connect_timeout: Duration::from_millis(500),
            call_timeout: Duration::from_secs(2),
            recovery_timeout: Duration::ZERO,
            ..Options::default()
        };
        let client = Client::new([self.address()], options).expect("valid options");
        client.status().await.ok()
    }

    /// Waits until every replica is ready.
    pub async fn wait_ready(&self) {
        let wanted = self.builder.replicas as usize;
        let what = format!(
            "{wanted} ready replicas; logs in {}",
            self.directory.display()
        );
        until(&what, READY_DEADLINE, || async {
            let status = self.status().await?;
            let ready = status
                .replicas
                .iter()
                .filter(|replica| replica.state == "ready")
                .count();
            (ready == wanted).then_some(())
        })
        .await;
    }

    /// One replica, as the gateway sees it.
    pub async fn replica(&self, replica: u32) -> Option<ReplicaStatus> {
        self.status()
            .await?
            .replicas
            .into_iter()
            .find(|status| status.replica == replica)
    }

    /// The worker of a replica.
    pub async fn worker(&self, replica: u32) -> WorkerStatus {
        let found = until("a worker's status", READY_DEADLINE, || async {
            self.replica(replica).await
        })
        .await;
        found
            .workers
            .into_iter()
            .next()
            .expect("a replica has a worker")
    }

    /// Pid of a replica's engine.
    pub async fn engine_pid(&self, replica: u32) -> u32 {
        until("an engine's pid", READY_DEADLINE, || async {
            let replica = self
                .replica(replica)
                .await
                .filter(|replica| replica.state == "ready")?;
            replica.workers.first()?.engine_pid
        })
        .await
    }

    /// Sends a signal to a process of this cluster.
    pub fn signal(&self, pid: u32, signal: Signal) {
        // One that has ended in the meantime is what a test's race looks like, and no failure.
        kill(Pid::from_raw(pid as i32), signal).ok();
    }

    pub fn kill_node(&mut self, node: usize) {
        if let Some(mut child) = self.nodes[node].take() {
            child.kill().ok();
            child.wait().ok();
        }
    }

    pub fn start_node(&mut self, node: usize) {
        assert!(self.nodes[node].is_none(), "node {node} runs");
        self.nodes[node] = Some(self.spawn(node));
    }

    /// Asks a node to stop, and gives its exit code.
    pub async fn stop_node(&mut self, node: usize, limit: Duration) -> Option<i32> {
        let child = self.nodes[node].as_mut().expect("the node runs");
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("the node can be signalled");
        self.end_of_node(node, limit).await
    }

    /// Waits for a node that ends by itself, and gives its exit code.
    pub async fn end_of_node(&mut self, node: usize, limit: Duration) -> Option<i32> {
        let child = self.nodes[node].as_mut().expect("the node runs");
        let cell = std::cell::RefCell::new(child);
        let status = until("the end of a node", limit, || async {
            cell.borrow_mut().try_wait().ok().flatten()
        })
        .await;
        self.nodes[node] = None;
        status.code()
    }

    /// What a node has logged.
    pub fn log(&self, node: usize) -> String {
        let name = &self.builder.nodes[node].0;
        std::fs::read_to_string(self.directory.join(format!("{name}.log"))).unwrap_or_default()
    }

    fn spawn(&self, node: usize) -> Child {
        let name = &self.builder.nodes[node].0;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.join(format!("{name}.log")));
        let log = log.expect("a log file");
        Command::new(programs::understudy())
            .args(["node", "--name", name, "--config"])
            .arg(&self.config)
            .env("UNDERSTUDY_ENGINE", &self.engine)
            .envs(self.builder.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("the node starts")
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        for node in 0..self.nodes.len() {
            // Engines die with their node.
            self.kill_node(node);
        }
        if std::thread::panicking() {
            eprintln!(
                "the cluster's files are kept in {}",
                self.directory.display()
            );
        } else {
            std::fs::remove_dir_all(&self.directory).ok();
        }
    }
}

fn fresh_directory() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let directory =
        std::env::temp_dir().join(format!("understudy-test-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory for the cluster");
    directory
}

fn write_cookie(path: &Path) {
    use std::os::unix::fs::OpenOptionsExt;
    let secret: String = (0..64)
        .map(|_| char::from_digit(fastrand::u32(0..16), 16).expect("a digit"))
        .collect();
    let mut file = File::options()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .expect("a cookie file");
    std::io::Write::write_all(&mut file, secret.as_bytes()).expect("a cookie file");
}
