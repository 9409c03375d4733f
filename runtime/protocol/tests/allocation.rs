//! What hostile bytes cost in memory, measured with an allocator that counts. One test, so that nothing else counts.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::mutate::damage;
use understudy_protocol::codec::max_decode_bytes;
use understudy_protocol::frame::READ_CHUNK_BYTES;
use understudy_protocol::{FrameDecoder, decode_client};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes allocated at the worst moment of `work`, beyond what was before.
fn peak(work: impl FnOnce()) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work();
    PEAK.load(Ordering::Relaxed) - before
}

fn assert_cheap(name: &str, payload: &[u8]) {
    let cost = peak(|| drop(decode_client(payload)));
    let allowed = max_decode_bytes(payload.len());
    assert!(
        cost <= allowed,
        "{name}: {cost} bytes for a payload of {}, {allowed} allowed",
        payload.len()
    );
}

/// `{"type": "submit", "stream": 1, <key>: <value>}`
fn submit_with(key: &str, value: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x83\xa4type\xa6submit\xa6stream\x01".to_vec();
    bytes.push(0xa0 | key.len() as u8);
    bytes.extend_from_slice(key.as_bytes());
    bytes.extend_from_slice(value);
    bytes
}

/// An array of `count` times the same element.
fn array(count: u32, element: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xdd];
    bytes.extend_from_slice(&count.to_be_bytes());
    bytes.extend(element.repeat(count as usize));
    bytes
}

fn input(kind: &str, value: Vec<u8>) -> Vec<u8> {
    let mut bytes = vec![0x81, 0xa0 | kind.len() as u8];
    bytes.extend_from_slice(kind.as_bytes());
    bytes.extend_from_slice(&value);
    bytes
}

/// Headers that claim 2³² − 1 elements, nested.
fn nested_claims(marker: u8, depth: usize) -> Vec<u8> {
    [marker, 0xff, 0xff, 0xff, 0xff].repeat(depth)
}

#[test]
fn memory_stays_in_proportion_to_the_bytes_received() {
    for marker in [0xdd, 0xdf, 0xdb, 0xc6] {
        for depth in [1, 10, 1000] {
            for key in ["stop", "input", "sampling", "unknown"] {
                assert_cheap("claims", &submit_with(key, &nested_claims(marker, depth)));
            }
        }
    }
    let empty_text = [0xa0];
    let pair = [0x92, 0xa0, 0xa0];
    for count in [1_000, 21_000, 32_769, 65_000, 1_000_000] {
        assert_cheap("stops", &submit_with("stop", &array(count, &empty_text)));
        assert_cheap(
            "ids",
            &submit_with("input", &input("token_ids", array(count, &[1]))),
        );
        assert_cheap(
            "chat",
            &submit_with("input", &input("messages", array(count, &pair))),
        );
        assert_cheap("unknown", &submit_with("unknown", &array(count, &pair)));
        assert_cheap(
            "text",
            &submit_with("input", &input("prompt", vec![0xdb, 0, 0, 0xff, 0xff])),
        );
    }
    damaged_messages_are_cheap();
    a_claimed_frame_is_cheap();
    the_check_can_fail();
}

fn damaged_messages_are_cheap() {
    let samples: Vec<Vec<u8>> = common::client_messages()
        .iter()
        .map(common::payload)
        .collect();
    let mut rng = fastrand::Rng::with_seed(0x5eed_0003);
    for _ in 0..50_000 {
        let sample = rng.usize(..samples.len());
        assert_cheap("damaged", &damage(&mut rng, &samples[sample], &samples));
    }
}

fn a_claimed_frame_is_cheap() {
    let cost = peak(|| {
        let mut decoder = FrameDecoder::new(u32::MAX as usize);
        decoder.extend(&[0xff, 0xff, 0xff, 0xff, 0x81]);
        assert_eq!(decoder.next_frame(), Ok(None));
        decoder.buffer_mut();
        assert_eq!(decoder.next_frame(), Ok(None));
    });
    assert!(
        cost <= 2 * READ_CHUNK_BYTES + 1024,
        "{cost} bytes for a claim"
    );
}

/// Without the scan the same bytes cost a mebibyte for each level of nesting.
fn the_check_can_fail() {
    let bytes = submit_with("unknown", &nested_claims(0xdd, 100));
    let unchecked = peak(|| {
        drop(rmp_serde::from_slice::<
            understudy_protocol::message::ClientMessage,
        >(&bytes));
    });
    assert!(
        unchecked > max_decode_bytes(bytes.len()),
        "{unchecked} bytes without the scan"
    );
}
