use super::*;
use crate::testing::Dice;

fn content(number: u32) -> Content {
    let parent = BlockHash::root("test", 0);
    let tokens = [number; BLOCK];
    Content {
        hash: parent.child(&tokens),
        parent,
        tokens,
    }
}

fn registered(blocks: &mut BlockManager, number: u32) -> BlockId {
    let block = blocks.allocate().unwrap();
    blocks.register(block, content(number));
    block
}

#[test]
fn the_prefix_that_was_not_used_longest_goes_first_and_used_blocks_never() {
    let mut blocks = BlockManager::new(4);
    let ids: Vec<BlockId> = (0..4).map(|n| registered(&mut blocks, n)).collect();
    assert_eq!(blocks.allocate(), None);
    for index in [2, 0, 1] {
        blocks.release(ids[index]);
    }
    blocks.share(ids[0]);
    blocks.release(ids[0]);
    assert_eq!(blocks.counts().cached, 3);
    let order: Vec<_> = std::iter::from_fn(|| blocks.allocate()).collect();
    assert_eq!(order, [ids[2], ids[1], ids[0]]);
    assert_eq!(blocks.evictions(), 3);
    assert_eq!(blocks.lookup(content(2).hash), None);
    assert_eq!(blocks.lookup(content(3).hash), Some(ids[3]));
}

#[test]
fn who_writes_to_what_others_may_read_gets_a_copy() {
    let mut blocks = BlockManager::new(3);
    let own = blocks.allocate().unwrap();
    assert_eq!(blocks.make_writable(own), Writable::Already);
    blocks.share(own);
    let Writable::Copy { to } = blocks.make_writable(own) else {
        panic!("shared");
    };
    assert_eq!(blocks.make_writable(own), Writable::Already, "one is gone");
    blocks.register(own, content(1));
    let Writable::Copy { to: third } = blocks.make_writable(own) else {
        panic!("registered");
    };
    assert!(blocks.is_cached(own));
    blocks.share(own);
    assert_eq!(
        blocks.make_writable(own),
        Writable::Already,
        "no room for a copy"
    );
    assert_eq!(blocks.lookup(content(1).hash), None, "so it is forgotten");
    blocks.share(own);
    assert_eq!(blocks.make_writable(own), Writable::NoRoom);
    blocks
        .verify([&[own, own][..], &[to, third]].into_iter())
        .unwrap();
}

#[test]
fn the_first_block_of_a_content_stays_the_known_one() {
    let mut blocks = BlockManager::new(2);
    let (first, second) = (registered(&mut blocks, 1), registered(&mut blocks, 1));
    assert_eq!(blocks.lookup(content(1).hash), Some(first));
    blocks.release(second);
    assert_eq!(
        blocks.counts(),
        BlockCounts {
            free: 1,
            used: 1,
            cached: 0
        }
    );
}

#[test]
fn every_block_is_in_one_state_through_random_use() {
    let mut dice = Dice::new(5);
    for _ in 0..200 {
        let mut blocks = BlockManager::new(1 + dice.throw(12));
        let mut held: Vec<BlockId> = Vec::new();
        for _ in 0..200 {
            let index = dice.throw(held.len().max(1));
            match dice.throw(6) {
                0 | 1 => held.extend(blocks.allocate()),
                2 if !held.is_empty() => blocks.release(held.swap_remove(index)),
                3 if !held.is_empty() => {
                    blocks.register(held[index], content(dice.throw(20) as u32));
                }
                4 => {
                    if let Some(block) = blocks.lookup(content(dice.throw(20) as u32).hash) {
                        blocks.share(block);
                        held.push(block);
                    }
                }
                5 if !held.is_empty() => {
                    if let Writable::Copy { to } = blocks.make_writable(held[index]) {
                        held[index] = to;
                    }
                }
                _ => {}
            }
            blocks.verify(held.chunks(3)).unwrap();
        }
    }
}

#[test]
#[should_panic(expected = "released twice")]
fn a_table_released_twice_is_a_bug() {
    let mut blocks = BlockManager::new(1);
    let block = blocks.allocate().unwrap();
    blocks.release(block);
    blocks.release(block);
}
