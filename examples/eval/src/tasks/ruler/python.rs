//! The draws of Python's `random` and of NumPy's `random.randint`, so that samples are those of RULER's own
//! generators.
//!
//! Mersenne Twister (Matsumoto and Nishimura 1998); what is drawn from it is as CPython 3 does it, with
//! `random.seed(n)`, and as NumPy's legacy `RandomState` does it, with `numpy.random.seed(n)`.

const N: usize = 624;
const M: usize = 397;

/// A stream of draws.
#[derive(Debug, Clone)]
pub(super) struct Python {
    state: [u32; N],
    at: usize,
}

impl Python {
    /// `random.seed(seed)`, `random.Random(seed)`.
    pub(super) fn new(seed: u64) -> Self {
        let mut key = vec![seed as u32];
        if seed >> 32 != 0 {
            key.push((seed >> 32) as u32);
        }
        let mut this = Self::numpy(19_650_218);
        let s = &mut this.state;
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            let mixed = (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_664_525);
            s[i] = (s[i] ^ mixed).wrapping_add(key[j]).wrapping_add(j as u32);
            i += 1;
            j = (j + 1) % key.len();
            if i == N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            let mixed = (s[i - 1] ^ (s[i - 1] >> 30)).wrapping_mul(1_566_083_941);
            s[i] = (s[i] ^ mixed).wrapping_sub(i as u32);
            i += 1;
            if i == N {
                s[0] = s[N - 1];
                i = 1;
            }
        }
        s[0] = 1 << 31;
        this
    }

    /// `numpy.random.seed(seed)`.
    pub(super) fn numpy(seed: u32) -> Self {
        let mut state = [seed; N];
        for i in 1..N {
            let mixed = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_812_433_253);
            state[i] = mixed.wrapping_add(i as u32);
        }
        Self { state, at: N }
    }

    fn next(&mut self) -> u32 {
        if self.at == N {
            for i in 0..N {
                let y = (self.state[i] & 1 << 31) | (self.state[(i + 1) % N] & !(1 << 31));
                let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ twist;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `getrandbits(bits)`, up to 128.
    pub(super) fn bits(&mut self, bits: u32) -> u128 {
        let (mut all, mut done) = (0u128, 0);
        while done < bits {
            let take = (bits - done).min(32);
            all |= u128::from(self.next() >> (32 - take)) << done;
            done += take;
        }
        all
    }

    /// `randrange(n)`; 0 for none.
    pub(super) fn below(&mut self, n: usize) -> usize {
        if n == 0 {
            return 0;
        }
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = self.bits(bits) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// `random()`.
    fn random(&mut self) -> f64 {
        let (a, b) = (self.next() >> 5, self.next() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }

    /// `choices(alphabet, k=length)` of ASCII letters from `first` on, as one word.
    pub(super) fn letters(&mut self, first: u8, length: usize) -> String {
        let mut letter = || char::from(first + (self.random() * 26.0) as u8);
        (0..length).map(|_| letter()).collect()
    }

    /// `sample(range(n), k)`, with `k` at most `n`.
    pub(super) fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let k = k.min(n);
        let mut most = 21;
        if k > 5 {
            most += 4usize.pow(((3 * k) as f64).log(4.0).ceil() as u32);
        }
        if n <= most {
            let mut pool: Vec<usize> = (0..n).collect();
            let mut take = |i: usize| {
                let at = self.below(n - i);
                let taken = pool[at];
                pool[at] = pool[n - i - 1];
                taken
            };
            return (0..k).map(&mut take).collect();
        }
        let mut chosen = Vec::with_capacity(k);
        let mut seen = std::collections::HashSet::new();
        while chosen.len() < k {
            let at = self.below(n);
            if seen.insert(at) {
                chosen.push(at);
            }
        }
        chosen
    }

    /// `shuffle(list)`.
    pub(super) fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }

    /// `numpy.random.randint(low, high)`, of a range of less than 2³².
    pub(super) fn randint(&mut self, low: u32, high: u32) -> u32 {
        let range = high - low - 1;
        let mask = u32::MAX.checked_shr(range.leading_zeros()).unwrap_or(0);
        loop {
            let drawn = self.next() & mask;
            if drawn <= range {
                return low + drawn;
            }
        }
    }
}
