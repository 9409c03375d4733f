//! Reads a node's metrics.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The Prometheus text of a node.
///
/// # Panics
/// If the node does not serve it.
pub async fn text(address: &str) -> String {
    let mut socket = TcpStream::connect(address)
        .await
        .expect("the metrics port is open");
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    socket
        .write_all(request.as_bytes())
        .await
        .expect("the metrics port takes a request");
    let mut answer = String::new();
    socket
        .read_to_string(&mut answer)
        .await
        .expect("the metrics port answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    body.to_owned()
}

/// The sum of all series of a metric whose labels contain `label`.
pub fn sum(text: &str, metric: &str, label: &str) -> f64 {
    let series = text.lines().filter(|line| {
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        name == metric && line.contains(label)
    });
    series
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}
