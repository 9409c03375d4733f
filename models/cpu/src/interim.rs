//! interim
pub mod ops {
    use understudy_kernels::{Pool, exp};
    pub use understudy_kernels::elementwise::{add, rms_norm};
    #[derive(Clone, Copy)]
    pub struct Heads { pub stride: usize, pub offset: usize, pub heads: usize, pub head_dim: usize }
    #[derive(Clone, Copy)]
    pub enum Activation { Silu, GeluTanh, GeluErf, Relu, Tanh }
    pub fn layer_norm(_: &Pool, x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32]) {
        for (x, y) in x.chunks(w.len()).zip(y.chunks_mut(w.len())) {
            let n = w.len() as f64;
            let m = x.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
            let v = x.iter().map(|x| (f64::from(*x) - m).powi(2)).sum::<f64>() / n;
            for i in 0..w.len() { y[i] = ((f64::from(x[i]) - m) / (v + f64::from(eps)).sqrt()) as f32 * w[i] + b[i]; }
        }
    }
    pub fn rms_norm_heads(pool: &Pool, x: &mut [f32], h: Heads, w: &[f32], eps: f32) {
        for row in x.chunks_mut(h.stride) { for i in 0..h.heads {
            let part = &mut row[h.offset + i * h.head_dim..][..h.head_dim];
            let copy = part.to_vec();
            rms_norm(pool, &copy, w, eps, part);
        } }
    }
    pub fn rotate_heads(_: &Pool, x: &mut [f32], h: Heads, cos: &[f32], sin: &[f32], dim: usize) {
        let half = dim / 2;
        for (r, row) in x.chunks_mut(h.stride).enumerate() { for i in 0..h.heads {
            let part = &mut row[h.offset + i * h.head_dim..][..h.head_dim];
            for j in 0..half { let (a, b) = (part[j], part[j + half]); let (c, s) = (cos[r * half + j], sin[r * half + j]); part[j] = a * c - b * s; part[j + half] = b * c + a * s; }
        } }
    }
    fn act(a: Activation, x: f32) -> f32 { match a {
        Activation::Silu => x / (1.0 + exp(-x)),
        Activation::GeluTanh => (0.5 * f64::from(x) * (1.0 + (0.797_884_560_802_865_4 * (f64::from(x) + 0.044715 * f64::from(x).powi(3))).tanh())) as f32,
        Activation::GeluErf => { let z = f64::from(x) / 2f64.sqrt(); let t = 1.0 / (1.0 + 0.3275911 * z.abs()); let e = 1.0 - (((((1.061405429 * t - 1.453152027) * t) + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * (-z * z).exp(); (0.5 * f64::from(x) * (1.0 + e * z.signum())) as f32 }
        Activation::Relu => x.max(0.0), Activation::Tanh => x.tanh() } }
    pub fn activate_gated(_: &Pool, a: Activation, up: &[f32], inner: usize, y: &mut [f32]) {
        for (u, y) in up.chunks(2 * inner).zip(y.chunks_mut(inner)) { for i in 0..inner { y[i] = act(a, u[i]) * u[inner + i]; } }
    }
    pub fn activate(_: &Pool, a: Activation, x: &mut [f32]) { for x in x { *x = act(a, *x); } }
    pub fn add_rows(_: &Pool, x: &[f32], y: &mut [f32]) { add(x, y) }
    pub fn soft_cap(_: &Pool, cap: f32, x: &mut [f32]) { for x in x { *x = cap * (*x / cap).tanh(); } }
    pub fn softmax_row(x: &mut [f32]) { let m = x.iter().copied().fold(f32::MIN, f32::max); let mut s = 0.0; for v in x.iter_mut() { *v = exp(*v - m); s += *v; } for v in x { *v /= s; } }
}
pub mod attention {
    use understudy_kernels::Pool;
    pub struct Attend { pub heads: usize, pub q_stride: usize, pub scale: f32, pub soft_cap: Option<f32>, pub window: Option<usize> }
    #[derive(Clone, Copy)]
    pub struct RowPlace<'a> { pub table: &'a [u32], pub position: usize, pub len: usize }
    impl<'a> RowPlace<'a> {
        pub fn causal(table: &'a [u32], position: usize) -> Self { Self { table, position, len: position + 1 } }
        pub fn whole(table: &'a [u32], position: usize, len: usize) -> Self { Self { table, position, len } }
    }
    pub struct KvBlocks { pub k: Vec<f32>, pub v: Vec<f32>, kv_heads: usize, dim: usize, blocks: usize }
    impl KvBlocks {
        pub fn new(blocks: usize, kv_heads: usize, dim: usize) -> Self { let n = blocks * 16 * kv_heads * dim; Self { k: vec![0.0; n], v: vec![0.0; n], kv_heads, dim, blocks } }
        pub fn blocks(&self) -> usize { self.blocks }
        pub fn position_bytes(h: usize, d: usize) -> usize { h * d * 8 }
        pub fn block_bytes(&self) -> usize { self.kv_heads * self.dim * 8 * 16 }
        pub fn write_rows(&mut self, _: &Pool, places: &[RowPlace<'_>], k: &[f32], v: &[f32], stride: usize) {
            let n = self.kv_heads * self.dim;
            for (i, p) in places.iter().enumerate() { let at = (p.table[p.position / 16] as usize * 16 + p.position % 16) * n; self.k[at..at + n].copy_from_slice(&k[i * stride..][..n]); self.v[at..at + n].copy_from_slice(&v[i * stride..][..n]); }
        }
        pub fn copy_block(&mut self, from: u32, to: u32) { let n = self.kv_heads * self.dim * 16; let (f, t) = (from as usize * n, to as usize * n); self.k.copy_within(f..f + n, t); self.v.copy_within(f..f + n, t); }
        pub fn export(&self, b: u32, out: &mut Vec<u8>) { let n = self.kv_heads * self.dim * 16; for x in [&self.k, &self.v] { for v in &x[b as usize * n..][..n] { out.extend(v.to_le_bytes()); } } }
        pub fn import(&mut self, b: u32, bytes: &[u8]) { let n = self.kv_heads * self.dim * 16; for (i, c) in bytes.chunks(4).enumerate() { let v = f32::from_le_bytes(c.try_into().unwrap()); if i < n { self.k[b as usize * n + i] = v } else { self.v[b as usize * n + i - n] = v } } }
    }
    pub fn attend(_: &Pool, kv: &KvBlocks, places: &[RowPlace<'_>], call: &Attend, q: &[f32], out: &mut [f32]) {
        let (d, n) = (kv.dim, kv.kv_heads * kv.dim);
        for (r, p) in places.iter().enumerate() { for h in 0..call.heads {
            let q = &q[r * call.q_stride + h * d..][..d];
            let kh = h / (call.heads / kv.kv_heads);
            let first = call.window.map_or(0, |w| (p.position + 1).saturating_sub(w));
            let at = |pos: usize| (p.table[pos / 16] as usize * 16 + pos % 16) * n + kh * d;
            let mut s: Vec<f64> = (first..p.len).map(|pos| { let k = &kv.k[at(pos)..][..d]; let mut s: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() * f64::from(call.scale); if let Some(c) = call.soft_cap { s = f64::from(c) * (s / f64::from(c)).tanh(); } s }).collect();
            let m = s.iter().copied().fold(f64::MIN, f64::max); let mut t = 0.0; for s in &mut s { *s = (*s - m).exp(); t += *s; }
            let o = &mut out[(r * call.heads + h) * d..][..d];
            for (i, o) in o.iter_mut().enumerate() { *o = (s.iter().enumerate().map(|(j, s)| s * f64::from(kv.v[at(first + j) + i])).sum::<f64>() / t) as f32; }
        } }
    }
}
