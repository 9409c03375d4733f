//! Engines and nodes are killed and stopped while clients stream: nobody may notice.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use understudy_client::{ErrorCode, Input, Request};
use understudy_protocol::message::ReplicaStatus;
use understudy_tests::wait::until;
use understudy_tests::{Engine, TestCluster, TestClusterBuilder, collect, scrape};

use super::requests::{KINDS, assert_same, nth, refused, run_all};

/// Streams at once, over two replicas.
const STREAMS: u32 = 32;
const TOKENS: u32 = 400;

const SOON: Duration = Duration::from_secs(20);

/// Kills come quickly here: what is tested is recovery, not the restart intensity.
const PATIENT: &str = "[restart]\nintensity = 1000\nbackoff_initial_ms = 10\nbackoff_max_ms = 50\n[recovery]\nmax_attempts = 1000\nmax_engine_deaths = 1000";

fn fake() -> TestClusterBuilder {
    TestClusterBuilder::new(Engine::Fake)
        .step_ms(5)
        .settings(PATIENT)
}

/// Runs all requests undisturbed, and once more with a fault in the middle; both must look the same to the clients.
async fn with_fault(cluster: &mut TestCluster, fault: impl AsyncFnOnce(&mut TestCluster)) {
    let client = cluster.client();
    let expected = run_all(&client, STREAMS, TOKENS).await;
    // Reports are a little late: what they say next must be about the second run.
    until("idle replicas", SOON, || async {
        let status = cluster.status().await?;
        let idle = |replica: &ReplicaStatus| replica.workers.iter().all(|w| w.running == 0);
        status.replicas.iter().all(idle).then_some(())
    })
    .await;
    let disturbed = tokio::spawn({
        let client = client.clone();
        async move { run_all(&client, STREAMS, TOKENS).await }
    });
    until("streams on both replicas", SOON, || async {
        let status = cluster.status().await?;
        let busy = |replica: &ReplicaStatus| replica.workers.iter().any(|w| w.running > 4);
        status.replicas.iter().all(busy).then_some(())
    })
    .await;
    fault(cluster).await;
    assert_same(&expected, &disturbed.await.expect("the streams"));
}

async fn recoveries(cluster: &TestCluster, label: &str) -> f64 {
    let text = scrape::text(&cluster.metrics_address(0)).await;
    scrape::sum(&text, "understudy_recoveries_total", label)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_is_killed_under_32_streams() {
    let mut cluster = fake().start_ready().await.expect("the fake engine");
    with_fault(&mut cluster, async |cluster| {
        let pid = cluster.engine_pid(1).await;
        cluster.signal(pid, Signal::SIGKILL);
    })
    .await;
    cluster.wait_ready().await;
    assert_eq!(cluster.worker(1).await.restarts, 1);
    assert!(recoveries(&cluster, "engine_exit").await > 0.0);
    let text = scrape::text(&cluster.metrics_address(0)).await;
    assert_eq!(
        scrape::sum(&text, "understudy_recovery_stall_seconds_count", ""),
        scrape::sum(&text, "understudy_recoveries_total", ""),
    );
}

/// Killed, stopped, and lost with its node: LibTorch's streams go on as the fake engine's do.
#[tokio::test(flavor = "multi_thread")]
async fn real_engines_are_killed_stopped_and_lost_under_32_streams() {
    let cluster = TestClusterBuilder::new(Engine::Real)
        .settings(PATIENT)
        .start_ready()
        .await;
    let Some(mut cluster) = cluster else { return };
    for (signal, cause) in [
        (Signal::SIGKILL, "engine_exit"),
        (Signal::SIGSTOP, "engine_hang"),
    ] {
        with_fault(&mut cluster, async |cluster| {
            let pid = cluster.engine_pid(0).await;
            cluster.signal(pid, signal);
        })
        .await;
        cluster.wait_ready().await;
        assert!(recoveries(&cluster, cause).await > 0.0, "{cause}");
    }
    with_fault(&mut cluster, async |cluster| cluster.kill_node(1)).await;
    assert!(recoveries(&cluster, "node_lost").await > 0.0);
}

/// Requests keep coming while engines die: what is on its way to a dying worker must not be forgotten. With the
/// recovery settings that ship.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_arrive_while_engines_die_are_served() {
    const WAVES: u32 = 12;
    const WAVE: u32 = 8;
    let restart = "[restart]\nintensity = 1000\nbackoff_initial_ms = 10\nbackoff_max_ms = 50";
    let builder = TestClusterBuilder::new(Engine::Fake)
        .step_ms(2)
        .settings(restart);
    let cluster = builder.start_ready().await.expect("the fake engine");
    let client = cluster.client();
    let expected = run_all(&client, WAVE, 60).await;
    let mut waves = Vec::new();
    for wave in 0..WAVES {
        let pid = cluster.engine_pid(wave % 2).await;
        waves.push(tokio::spawn({
            let client = client.clone();
            async move { run_all(&client, WAVE, 60).await }
        }));
        cluster.signal(pid, Signal::SIGKILL);
    }
    for wave in waves {
        assert_same(&expected, &wave.await.expect("a wave"));
    }
    assert!(recoveries(&cluster, "engine_exit").await > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_node_is_killed_and_comes_back() {
    let mut cluster = fake().start_ready().await.expect("the fake engine");
    let pid = cluster.engine_pid(1).await;
    with_fault(&mut cluster, async |cluster| cluster.kill_node(1)).await;
    assert!(recoveries(&cluster, "node_lost").await > 0.0);
    until("an engine that died with its node", SOON, || async {
        std::fs::metadata(format!("/proc/{pid}"))
            .is_err()
            .then_some(())
    })
    .await;
    cluster.start_node(1);
    cluster.wait_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_engine_is_found_and_replaced() {
    let mut cluster = fake().start_ready().await.expect("the fake engine");
    let pid = cluster.engine_pid(0).await;
    with_fault(&mut cluster, async |cluster| {
        cluster.signal(pid, Signal::SIGSTOP)
    })
    .await;
    let recovered = recoveries(&cluster, "engine_hang").await;
    assert!(recovered > 0.0);
    // What clients waited, detection included: the limit of 800 ms for a silent engine, and a little.
    let text = scrape::text(&cluster.metrics_address(0)).await;
    let stalled = scrape::sum(&text, "understudy_recovery_stall_seconds_sum", "");
    let mean = stalled / scrape::sum(&text, "understudy_recovery_stall_seconds_count", "");
    assert!((0.4..3.0).contains(&mean), "streams stalled {mean} s");
    cluster.wait_ready().await;
    assert_ne!(cluster.engine_pid(0).await, pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_node_is_fenced_and_its_late_words_change_nothing() {
    let mut cluster = fake().start_ready().await.expect("the fake engine");
    let node = cluster.node_pid(1);
    with_fault(&mut cluster, async |cluster| {
        cluster.signal(node, Signal::SIGSTOP);
        until("requests that go on elsewhere", SOON, || async {
            (recoveries(cluster, "node_lost").await > 0.0).then_some(())
        })
        .await;
        // It wakes up while its requests are under way elsewhere, and says what it has left to say.
        cluster.signal(node, Signal::SIGCONT);
    })
    .await;
    // The node was declared dead: it has to come back as a new session, and then serve again.
    cluster.wait_ready().await;
    let client = cluster.client();
    let once = run_all(&client, STREAMS, 20).await;
    assert_same(&once, &run_all(&client, STREAMS, 20).await);
}

/// The model thread is stuck, while the heartbeat lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_hung_step_is_found_under_a_live_heartbeat() {
    let marker = std::env::temp_dir().join(format!("understudy-hang-once-{}", std::process::id()));
    std::fs::remove_file(&marker).ok();
    let cluster = fake()
        .settings("[failure_detector]\nengine_step_timeout_ms = 500")
        .env("UNDERSTUDY_FAKE_HANG_AT_STEP", 60)
        .env("UNDERSTUDY_FAKE_ONCE", marker.display())
        .start_ready()
        .await
        .expect("the fake engine");
    let client = cluster.client();
    let disturbed = run_all(&client, 8, TOKENS).await;
    assert!(marker.exists(), "the fault struck");
    assert!(recoveries(&cluster, "engine_hang").await > 0.0);
    // The fault strikes once: the second run is undisturbed.
    assert_same(&run_all(&client, 8, TOKENS).await, &disturbed);
    std::fs::remove_file(&marker).ok();
}

/// One stream of each kind, and an engine's death at each of its positions, prefill included: the engine aborts where it
/// would compute the token.
#[tokio::test(flavor = "multi_thread")]
async fn a_death_at_every_position_does_not_show() {
    const POSITIONS: u32 = 24;
    /// The position, prompt included, that no engine survives once.
    const DEADLY: u32 = 63;
    let marker = std::env::temp_dir().join(format!("understudy-deadly-{}", std::process::id()));
    std::fs::write(&marker, "").expect("a marker");
    let cluster = fake()
        .step_ms(1)
        .env("UNDERSTUDY_FAKE_ABORT_AT_POSITION", DEADLY)
        .env("UNDERSTUDY_FAKE_ONCE", marker.display())
        .start_ready()
        .await
        .expect("the fake engine");
    let client = cluster.client();
    for kind in 0..KINDS {
        for at in 0..POSITIONS {
            let mut request = nth(kind, POSITIONS);
            // Token `at` of the output comes from computing the position before it.
            let prompt = (0..DEADLY + 1 - at).map(|n| 17 + (n + kind) % 100);
            request.input = Input::TokenIds(prompt.collect());
            // No fault strikes while the marker is there.
            let expected = collect(&client, request.clone()).await;
            let expected = expected.expect("the fault-free run");
            let before = recoveries(&cluster, "engine_exit").await;
            std::fs::remove_file(&marker).expect("the marker");
            let got = collect(&client, request).await.expect("a stream");
            assert_eq!(expected, got, "kind {kind}, death at position {at}");
            if expected.ids.len() as u32 > at {
                assert!(marker.exists(), "kind {kind}, position {at}: it struck");
                let recovered = recoveries(&cluster, "engine_exit").await - before;
                assert_eq!(recovered, 1.0, "kind {kind}, death at position {at}");
            } else {
                std::fs::write(&marker, "").expect("a marker");
            }
        }
    }
    std::fs::remove_file(&marker).ok();
}

/// One request kills every engine that touches it. With the settings that ship: it ends, its neighbours notice nothing,
/// and no replica goes out of service for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_poison_request_ends_and_takes_nobody_along() {
    const NEIGHBOURS: u32 = 8;
    let builder = TestClusterBuilder::new(Engine::Fake).step_ms(5);
    let healthy = builder.clone().start_ready().await.expect("fake");
    let expected = run_all(&healthy.client(), NEIGHBOURS, TOKENS).await;
    drop(healthy);
    // A token that no neighbour has.
    let used = |id: &u32| expected.iter().any(|seen| seen.ids.contains(id));
    let poison = (1200..1600).find(|id| !used(id)).expect("an unused token");
    let cluster = builder
        .env("UNDERSTUDY_FAKE_ABORT_ON_TOKEN", poison)
        .start_ready()
        .await
        .expect("the fake engine");
    let client = cluster.client();
    let neighbours = tokio::spawn({
        let client = client.clone();
        async move { run_all(&client, NEIGHBOURS, TOKENS).await }
    });
    until("neighbours under way", SOON, || async {
        (cluster.status().await?.requests_in_flight == NEIGHBOURS).then_some(())
    })
    .await;
    let poison = Request::token_ids(vec![17, poison, 18]);
    let error = collect(&client, poison).await.expect_err("an end");
    assert_eq!(error.code(), Some(ErrorCode::AttemptsExhausted), "{error}");
    assert!(!error.is_retriable(), "trying again kills more engines");
    assert_same(&expected, &neighbours.await.expect("the neighbours"));
    cluster.wait_ready().await;
    let deaths = cluster.worker(0).await.restarts + cluster.worker(1).await.restarts;
    assert!((1..=4).contains(&deaths), "{deaths} engines died");
    for node in 0..2 {
        assert!(!cluster.log(node).contains("restart intensity exceeded"));
    }
    let text = scrape::text(&cluster.metrics_address(0)).await;
    let quarantined = scrape::sum(&text, "understudy_quarantined_requests_total", "");
    assert_eq!(quarantined, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_that_cannot_start_fail_fast_and_cost_nothing() {
    let cluster = TestClusterBuilder::new(Engine::Fake)
        .settings("[restart]\nintensity = 3\nbackoff_initial_ms = 10\nbackoff_max_ms = 20")
        .env("UNDERSTUDY_FAKE_FAIL_AT_START", 1)
        .start()
        .expect("the fake engine");
    until("both replicas down", SOON, || async {
        let status = cluster.status().await?;
        let down = status.replicas.len() == 2
            && status
                .replicas
                .iter()
                .all(|replica| replica.state == "down");
        down.then_some(())
    })
    .await;
    let worker = cluster.worker(0).await;
    assert_eq!(worker.restarts, 3, "the intensity bounds the restarts");
    assert!(
        worker
            .last_error
            .expect("a reason")
            .contains("told to fail at start")
    );
    let client = cluster.client();
    let asked = Instant::now();
    assert_eq!(refused(&client, nth(0, 10)).await, ErrorCode::Unavailable);
    assert!(
        asked.elapsed() < Duration::from_secs(1),
        "it fails fast, and does not wait for a replica"
    );
    let busy = cpu_share(cluster.node_pid(0), Duration::from_secs(2)).await;
    assert!(
        busy < 0.05,
        "an idle node uses {:.1} % of a core",
        busy * 100.0
    );
}

/// The share of one core that a process uses over a time.
async fn cpu_share(pid: u32, time: Duration) -> f64 {
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .expect("fields")
            .split_whitespace()
            .collect();
        fields[11].parse::<f64>().expect("user time")
            + fields[12].parse::<f64>().expect("system time")
    };
    let before = ticks();
    // The measurement is the wait itself.
    tokio::time::sleep(time).await;
    // SAFETY: sysconf reads a constant of the system.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    (ticks() - before) / per_second / time.as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_host_hands_its_requests_over() {
    let mut cluster = fake().start_ready().await.expect("the fake engine");
    with_fault(&mut cluster, async |cluster| {
        assert_eq!(cluster.stop_node(1, SOON).await, Some(0));
    })
    .await;
}

/// The only host stops and comes back: who waits for it meanwhile is served, as after a kill.
#[tokio::test(flavor = "multi_thread")]
async fn the_only_host_restarts_and_nobody_is_refused() {
    let mut cluster = fake()
        .gateway_and_host()
        .replicas(1)
        .start_ready()
        .await
        .expect("the fake engine");
    let client = cluster.client();
    let expected = run_all(&client, 8, 200).await;
    let disturbed = tokio::spawn({
        let client = client.clone();
        async move { run_all(&client, 8, 200).await }
    });
    until("streams under way", SOON, || async {
        (cluster.status().await?.requests_in_flight == 8).then_some(())
    })
    .await;
    assert_eq!(cluster.stop_node(1, SOON).await, Some(0));
    // Nobody can serve these now.
    let late = tokio::spawn({
        let client = client.clone();
        async move { run_all(&client, 8, 200).await }
    });
    cluster.start_node(1);
    assert_same(&expected, &disturbed.await.expect("the streams"));
    assert_same(&expected, &late.await.expect("the streams"));
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_and_abandoned_requests_free_their_places() {
    let cluster = fake().start_ready().await.expect("the fake engine");
    let client = cluster.client();
    let mut streams = Vec::new();
    for n in 0..STREAMS {
        let mut stream = client.submit(nth(n * 6, 1000)).await.expect("a stream");
        stream.next().await.expect("an event");
        streams.push(stream);
    }
    streams
        .iter_mut()
        .step_by(2)
        .for_each(|stream| stream.cancel());
    drop(streams);
    let freed = Instant::now();
    until("free replicas", SOON, || async {
        let status = cluster.status().await?;
        let idle = status.requests_in_flight == 0
            && status.replicas.iter().all(|replica| replica.in_flight == 0);
        idle.then_some(())
    })
    .await;
    assert!(
        freed.elapsed() < Duration::from_secs(2),
        "it took {:?}",
        freed.elapsed()
    );
}
