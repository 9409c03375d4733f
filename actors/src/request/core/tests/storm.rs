//! Many events in any order, and logs that are read again.

use super::*;

/// Whatever is lost, repeated, reordered between attempts, or reconnected: a viewer sees the fault-free stream.
#[test]
fn every_seeded_storm_shows_the_same_stream() {
    let ids = [2, 3, 4, 5, 6, 7, 9];
    for seed in 0..2000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let now = Instant::now();
        let admission = admission(&[]);
        let text = TextFold::new(model(), &admission).unwrap();
        let mut core = RequestCore::new(
            admission,
            text,
            Settings {
                max_attempts: u32::MAX,
                max_engine_deaths: u32::MAX,
                ..SETTINGS
            },
            now,
        );
        core.start();
        let (mut seen, mut ends, mut stream) = (Vec::new(), 0, 1);
        let mut effects = core.attach(stream, 0, random.u32(0..4)).unwrap();
        let mut next = vec![0_u32; 2];
        for _ in 0..400 {
            seen.extend(shown(&effects));
            ends += terminals(&effects).len();
            if ends > 0 {
                break;
            }
            let epoch = core.epoch() as usize;
            next.resize(epoch + 1, core.committed());
            effects = match random.u32(0..10) {
                0 => core.lost(random.u32(1..=epoch as u32), LossCause::EngineExit, now),
                1 => core.credit(random.u32(0..3), 8),
                2 => {
                    core.detach();
                    stream += 1;
                    core.attach(stream, seen.len() as u32, random.u32(0..4))
                        .unwrap()
                }
                // A zombie, or the current attempt; sometimes a message of it is lost on the way.
                _ => {
                    let of = if random.u8(0..4) == 0 {
                        random.usize(1..=epoch)
                    } else {
                        epoch
                    };
                    let position = next[of].min(ids.len() as u32 - 1);
                    next[of] = position + 1;
                    let lost_on_the_way = random.u8(0..12) == 0;
                    // What a zombie says must not matter: it says something else.
                    let id = if of == epoch {
                        ids[position as usize]
                    } else {
                        8
                    };
                    let message = vec![token(of as u32, position, id)];
                    if lost_on_the_way {
                        Vec::new()
                    } else {
                        core.tokens(message, now)
                    }
                }
            };
        }
        // Let it end in peace.
        while ends == 0 {
            let position = core.committed();
            effects.extend(core.credit(8, 8));
            if core.outcome().is_none() {
                effects.extend(core.tokens(
                    vec![token(core.epoch(), position, ids[position as usize])],
                    now,
                ));
            }
            seen.extend(shown(&effects));
            ends += terminals(&effects).len();
            effects.clear();
        }
        let expected: Vec<(u32, u32)> = ids
            .iter()
            .enumerate()
            .map(|(i, id)| (i as u32, *id))
            .collect();
        let got: Vec<(u32, u32)> = seen
            .iter()
            .map(|(position, id, _)| (*position, *id))
            .collect();
        assert_eq!((got, ends), (expected, 1), "seed {seed}");
    }
}

#[test]
fn a_closed_log_is_read_again_just_as_it_was() {
    let now = Instant::now();
    let mut live = core(&["w5"]);
    let mut first = live.attach(1, 0, 100).unwrap();
    for (position, id) in [2, 3, 4, 5].into_iter().enumerate() {
        first.extend(live.tokens(vec![token(1, position as u32, id)], now));
    }
    let kept = first
        .iter()
        .find_map(|e| {
            if let Effect::Keep(kept) = e {
                Some(kept.clone())
            } else {
                None
            }
        })
        .unwrap();
    let text = TextFold::new(model(), &kept.admission).unwrap();
    let mut again = RequestCore::finished(*kept, text, SETTINGS, now);
    let second = again.attach(1, 0, 100).unwrap();
    assert_eq!(shown(&second), shown(&first));
    assert_eq!(terminals(&second), terminals(&first));
    assert!(again.is_over());
    let mut beyond = again;
    assert_eq!(
        beyond.attach(1, 5, 1).unwrap_err().code,
        ErrorCode::InvalidRequest
    );
}
