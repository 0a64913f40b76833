"""Every reply has the names and JSON types of the recorded one."""
import json

import numpy as np
import pytest

from stratfam.core import Bars, VirtualClock
from stratfam.weex.exchange import Exchange, add_user
from stratfam.weex.gateway import InProcessTransport, signature
from stratfam.weex.push import Hub

# Recorded or documented replies. Values are examples; names and types are what is compared.
PUBLIC = {
    "/capi/v3/market/time": '{"serverTime":1764505776347}',
    "/capi/v3/market/apiTradingSymbols": '["ETHUSDT"]',
    "/capi/v3/market/exchangeInfo?symbol=BTCUSDT": '''{"assets":[{"asset":"BTC","marginAvailable":false}],"symbols":[{"symbol":"ETHUSDT",
        "baseAsset":"ETH","quoteAsset":"USDT","marginAsset":"USDT","pricePrecision":"2","quantityPrecision":"3","baseAssetPrecision":"2",
        "quotePrecision":"8","contractVal":"0.001","delivery":["00:00:00"],"forwardContractFlag":true,"minLeverage":"1","maxLeverage":"400",
        "buyLimitPriceRatio":"0.01","sellLimitPriceRatio":"0.01","makerFeeRate":"0.0002","takerFeeRate":"0.0008","minOrderSize":"0.001",
        "maxOrderSize":"1000000","maxPositionSize":"5000000","marketOpenLimitSize":"2300"}]}''',
    "/capi/v3/market/klines?symbol=BTCUSDT&interval=1h&limit=1":
        '[[1764505740000,"69340.1","69380.0","69320.5","69355.2","25.678",1764505800000,"1782223.45",125,"12.345","856789.12"]]',
    "/capi/v3/market/ticker/24hr?symbol=BTCUSDT": '''[{"symbol":"ETHUSDT","priceChange":"-75.49","priceChangePercent":"-0.034992",
        "lastPrice":"2081.80","openPrice":"2157.29","highPrice":"2167.51","lowPrice":"2059.17","volume":"623160.426",
        "quoteVolume":"1310647345.19346","openTime":1775493000000,"closeTime":1775579400000,"markPrice":"2081.8","indexPrice":"2082.75"}]''',
    "/capi/v3/market/ticker/bookTicker?symbol=BTCUSDT":
        '[{"symbol":"BTCUSDT","bidPrice":"69350.1","bidQty":"12.5","askPrice":"69351.0","askQty":"8.3","time":1764505776000}]',
    "/capi/v3/market/depth?symbol=BTCUSDT": '{"bids":[["69350.1","12.5"]],"asks":[["69351.0","3.6"]],"lastUpdateId":1234567890123}',
    "/capi/v3/market/trades?symbol=BTCUSDT": '''[{"id":"875fba11-f8a1-42ad-915d-012ccb375e8a","price":"2114.77","qty":"0.01000",
        "quoteQty":"21.1477000","time":1775594995485,"isBuyerMaker":false,"isBestMatch":true}]''',
    "/capi/v3/market/symbolPrice?symbol=BTCUSDT": '{"symbol":"ETHUSDT","price":"1929.18","time":1786347445044}',
    "/capi/v3/market/openInterest?symbol=BTCUSDT": '{"symbol":"ETHUSDT","openInterest":"1772356.352","time":1775595582598}',
    "/capi/v3/market/premiumIndex?symbol=BTCUSDT": '''[{"symbol":"ETHUSDT","markPrice":"2133.71","indexPrice":"2134.44",
        "forecastFundingRate":"0.00005618","lastFundingRate":"0.00001031","interestRate":"0.001","nextFundingTime":1775606400000,
        "time":1775597594265,"collectCycle":480}]''',
    "/capi/v3/market/fundingRate?symbol=BTCUSDT":
        '[{"symbol":"ETHUSDT","fundingRate":"0.00001031","fundingTime":1775577600000,"markPrice":"2079.26"}]',
    "/api/v3/exchangeInfo?symbol=BTCUSDT": '''{"timezone":"UTC","serverTime":1764506000123,"symbols":[{"symbol":"ETHUSDT","status":"TRADING",
        "baseAsset":"ETH","baseAssetPrecision":"8","quoteAsset":"USDT","quoteAssetPrecision":"8","tickSize":"0.01","stepSize":"0.00001",
        "minTradeAmount":"0.0001","maxTradeAmount":"99999","takerFeeRate":"0.001","makerFeeRate":"0.001","buyLimitPriceRatio":"0.1",
        "sellLimitPriceRatio":"0.1","marketBuyLimitSize":"99999","marketSellLimitSize":"99999","marketFallbackPriceRatio":"0",
        "enableTrade":true,"enableDisplay":true,"displayDigitMerge":"0.01,0.1,0.5,1,5","displayNew":false,"displayHot":false}]}''',
    "/api/v3/market/ticker/price?symbol=BTCUSDT": '[{"symbol":"ETHUSDT","price":"1929.67"}]',
    "/api/v3/market/ticker/24hr?symbol=BTCUSDT": '''[{"symbol":"ETHUSDT","priceChange":"-72.98","priceChangePercent":"-0.033811",
        "lastPrice":"2085.46","bidPrice":"2085.44","bidQty":"1.53848","askPrice":"2085.47","askQty":"1.87504","openPrice":"2158.44",
        "highPrice":"2168.40","lowPrice":"2061.12","volume":"157359.56105","quoteVolume":"331284305.7193626","openTime":1775493000000,
        "closeTime":1775579400000,"count":59727}]''',
}
PRIVATE = {
    "/capi/v3/account/balance":
        '[{"asset":"USDT","balance":"5696.49288823","availableBalance":"5413.06877369","frozen":"81.28240000","unrealizePnl":"-34.55300000"}]',
    "/capi/v3/account/commissionRate?symbol=BTCUSDT": '{"symbol":"DOGEUSDT","makerCommissionRate":"0.0002","takerCommissionRate":"0.0008"}',
    "/capi/v3/account/accountConfig":
        '{"canTrade":true,"canDeposit":true,"canWithdraw":true,"dualSidePosition":true,"updateTime":1713339011237}',
    "/capi/v3/account/symbolConfig?symbol=BTCUSDT": '''[{"symbol":"DOGEUSDT","marginType":"CROSSED","separatedType":"COMBINED",
        "crossLeverage":"20.00","isolatedLongLeverage":"20.00","isolatedShortLeverage":"20.00"}]''',
    "/capi/v3/account/position/allPosition": '''[{"id":737191855967437160,"asset":"USDT","symbol":"DOGEUSDT","side":"LONG",
        "marginType":"CROSSED","separatedMode":"COMBINED","separatedOpenOrderId":0,"leverage":"20.00","size":"300","openValue":"27.96900",
        "openFee":"0.02237520","fundingFee":"0","marginSize":"100","isolatedMargin":"0","isAutoAppendIsolatedMargin":false,"cumOpenSize":"300",
        "cumOpenValue":"27.96900","cumOpenFee":"0.02237520","cumCloseSize":"0","cumCloseValue":"0","cumCloseFee":"0","cumFundingFee":"0",
        "cumLiquidateFee":"0","createdMatchSequenceId":5762536243,"updatedMatchSequenceId":5762741613,"createdTime":1775760234825,
        "updatedTime":1775763170789,"unrealizePnl":"0.00600","liquidatePrice":"0"}]''',
    "/capi/v3/openOrders": '''[{"avgPrice":"0.00000","clientOrderId":"857e1482","cumQuote":"0","executedQty":"0",
        "orderId":737185556881998184,"origQty":"1400","price":"0.05000","reduceOnly":false,"side":"BUY","positionSide":"LONG","status":"NEW",
        "stopPrice":"0","symbol":"DOGEUSDT","time":1775758733006,"timeInForce":"GTC","type":"LIMIT","updateTime":1775758733006,
        "workingType":"UNKNOWN_PRICE_TYPE"}]''',
    "/capi/v3/userTrades": '''[{"id":737074389731770728,"orderId":737074043320009064,"symbol":"DOGEUSDT","buyer":true,
        "commission":"0.00183500","commissionAsset":"USDT","maker":true,"price":"0.09175","qty":"100","quoteQty":"9.17500","realizedPnl":"0",
        "side":"BUY","positionSide":"LONG","time":1775732228692}]''',
    "/capi/v3/openAlgoOrders": '''[{"algoId":737074389748547944,"clientAlgoId":"d574","algoType":"CONDITIONAL","orderType":"STOP_MARKET",
        "symbol":"DOGEUSDT","side":"SELL","positionSide":"LONG","timeInForce":"IOC","quantity":"100","algoStatus":"UNTRIGGERED",
        "actualOrderId":737074043320009064,"actualPrice":"0.00000","triggerPrice":"0.02000","price":"0.00000","tpTriggerPrice":null,
        "tpPrice":null,"slTriggerPrice":null,"slPrice":null,"tpOrderType":null,"workingType":"CONTRACT_PRICE","closePosition":false,
        "reduceOnly":true,"createTime":1775732228695,"updateTime":1775732228695,"triggerTime":0}]''',
    "/capi/v3/sim/balance":
        '[{"asset":"SUSDT","balance":"5696.49288823","availableBalance":"5413.06877369","frozen":"81.28240000","unrealizePnl":"-34.55300000"}]',
    "/api/v3/account/": '''{"makerCommission":0,"takerCommission":0,"commissionRates":{"maker":"0.00000000","taker":"0.00000000"},
        "canTrade":true,"canWithdraw":true,"canDeposit":true,"updateTime":1775601317093,"accountType":"SPOT",
        "balances":[{"asset":"USDT","free":"20.00000000","locked":"0"}],"permissions":["SPOT"],"uid":1}''',
    "/api/v3/openOrders": '''[{"symbol":"DOGEUSDT","orderId":736800333186991070,"clientOrderId":"0820","price":"0.08500","origQty":"300.0",
        "executedQty":"0","cummulativeQuoteQty":"0","status":"NEW","timeInForce":"GTC","type":"LIMIT","side":"BUY","time":1775666888520,
        "updateTime":1775666888536,"isWorking":true}]''',
    "/api/v3/myTrades?symbol=BTCUSDT": '''[{"symbol":"DOGEUSDT","id":736825748291060702,"orderId":736825748215563230,"price":"0.09349",
        "qty":"250.0","quoteQty":"23.3725","commission":"0.0233725","time":1775672947953,"isBuyer":false}]''',
}
POSTED = {
    ("POST", "/capi/v3/account/income", "{}"): '''{"hasNextPage":false,"nextKey":null,"items":[{"billId":"793622764958253481","asset":"USDT",
        "symbol":"VIRTUALUSDT","income":"0.00000378","incomeType":"position_funding","balance":"29.36239410","fillFee":"0",
        "time":"1789214411964","transferReason":"UNKNOWN_TRANSFER_REASON"}]}''',
    ("POST", "/capi/v3/account/leverage", '{"symbol":"BTCUSDT","marginType":"CROSSED","crossLeverage":10}'):
        '{"symbol":"BTCUSDT","marginType":"ISOLATED","crossLeverage":"0","isolatedLongLeverage":"20","isolatedShortLeverage":"20"}',
    ("POST", "/capi/v3/account/marginType", '{"symbol":"ETHUSDT","marginType":"CROSSED"}'):
        '{"code":"200","msg":"success","requestTime":1764505776347}',
    ("DELETE", "/capi/v3/order?origClientOrderId=rest-1", ""):
        '{"orderId":"702345678901234567","origClientOrderId":"my-order-0001","success":true,"errorCode":"","errorMessage":""}',
    ("DELETE", "/api/v3/order?origClientOrderId=rest-2", ""): '{"origClientOrderId":"test_cancel_order","status":"CANCELED"}',
    ("DELETE", "/capi/v3/algoOpenOrders", ""): '[{"orderId":712345678901234567,"success":true,"errorCode":"","errorMessage":""}]',
    ("POST", "/capi/v3/closePositions", "{}"):
        '[{"positionId":737191855967437160,"successOrderId":737215340433375592,"errorMessage":"","success":true}]',
    ("POST", "/capi/v3/order", '{"symbol":"BTCUSDT","side":"BUY","positionSide":"LONG","type":"MARKET","quantity":"0.01","newClientOrderId":"m"}'):
        '{"orderId":"702345678901234567","clientOrderId":"my-order-0001","success":true,"errorCode":"","errorMessage":""}',
    ("POST", "/api/v3/order", '{"symbol":"BTCUSDT","side":"BUY","type":"MARKET","quantity":"0.01"}'):
        '{"symbol":"DOGEUSDT","orderId":736557215397183592,"clientOrderId":"c4551206d34641efbeb64abaa066946d","transactTime":1775608924724}',
}


def shape(value):
    "Names and types of a JSON value; a list of equals is the shape of one, null may stand for text."
    if isinstance(value, dict): return {k: shape(v) for k, v in value.items()}
    if isinstance(value, list):
        shapes = [shape(v) for v in value]
        return shapes[:1] if all(s == shapes[0] for s in shapes) else shapes
    return "text" if value is None else {str: "text", bool: "bool", int: "int", float: "float"}[type(value)]


class Venue:
    def __init__(self):
        t = np.datetime64("2024-01-01T00", "ns") + np.arange(12) * np.timedelta64(1, "h")
        c = np.full((12, 2), 40_000.0) * [1, 0.05]
        rate = np.where(np.arange(12) == 0, 1e-4, 0.0)[:, None] * np.ones((12, 2))
        made = lambda market: Bars(t, "1h", c, c + 5, c - 5, c, c * 0 + 9, rate * (market == "perp"), c > 0, ("BTC/USDT", "ETH/USDT"), market)
        self.x = Exchange([made("perp"), made("spot")])
        add_user(self.x, "weex_a", "secret", "pass", spot={"USDT": 5000, "BTC": "0.1"})
        self.clock = VirtualClock(int(t[2].astype("i8")))
        self.wire = InProcessTransport(self.x, self.clock)
        for path, body in (("/capi/v3/order", {"positionSide": "LONG", "type": "MARKET", "newClientOrderId": "open-1", "slTriggerPrice": "30000"}),
                           ("/capi/v3/order", {"positionSide": "LONG", "type": "LIMIT", "price": "39000", "newClientOrderId": "rest-1"}),
                           ("/api/v3/order", {"type": "MARKET", "newClientOrderId": "open-2"}),
                           ("/api/v3/order", {"type": "LIMIT", "price": "39000", "newClientOrderId": "rest-2"})):
            assert "orderId" in self("POST", path, json.dumps({"symbol": "BTCUSDT", "side": "BUY", "quantity": "0.01", **body}))

    def __call__(self, method, target, body=""):
        stamp, raw = str(self.clock.now_ns() // 10**6), body.encode()
        headers = {"ACCESS-KEY": "weex_a", "ACCESS-PASSPHRASE": "pass", "ACCESS-TIMESTAMP": stamp, "Content-Type": "application/json",
                   "ACCESS-SIGN": signature(b"secret", stamp, method, target, raw)}
        r = self.wire.send(method, "http://venue" + target, headers, raw)
        assert r.status == 200, r
        return json.loads(r.body)


@pytest.fixture(scope="module")
def venue(): return Venue()


@pytest.mark.parametrize("target", [*PUBLIC, *PRIVATE])
def test_a_read_has_the_recorded_shape(venue, target):
    assert shape(venue("GET", target)) == shape(json.loads({**PUBLIC, **PRIVATE}[target]))


def test_the_depth_has_fifteen_levels_of_text(venue):
    d = venue("GET", "/capi/v3/market/depth?symbol=BTCUSDT")
    assert list(d) == ["bids", "asks", "lastUpdateId"] and len(d["bids"]) == len(d["asks"]) == 15
    assert all(shape(level) == ["text"] and len(level) == 2 for side in ("bids", "asks") for level in d[side])
    assert len(venue("GET", "/capi/v3/market/depth?symbol=BTCUSDT&limit=200")["asks"]) == 200


@pytest.mark.parametrize("request_", POSTED, ids=lambda r: f"{r[0]} {r[1]}")
def test_an_action_has_the_recorded_shape(request_):
    assert shape(Venue()(*request_)) == shape(json.loads(POSTED[request_]))


FRAMES = {
    "orders": '''{"id":"617414920861909658","coin":"USDT","symbol":"BTCUSDT","marginMode":"CROSSED","separatedMode":"COMBINED",
        "separatedOpenOrderId":"0","positionSide":"LONG","orderSide":"BUY","price":"0.0","size":"0.10000","clientOrderId":"17","type":"MARKET",
        "timeInForce":"IOC","reduceOnly":false,"triggerPrice":"0","triggerPriceType":"CONTRACT_PRICE","orderSource":"WEB",
        "openTpslParentOrderId":"0","positionTpsl":false,"setOpenTp":false,"setOpenSl":false,"leverage":"20","takerFeeRate":"0.0006",
        "makerFeeRate":"0.0002","feeDiscount":"1","liquidateFeeRate":"0.01","status":"PENDING","triggerTime":"0","triggerPriceTime":"0",
        "triggerPriceValue":"0","cancelReason":"UNKNOWN_ORDER_CANCEL_REASON","latestFillPrice":"0","maxFillPrice":"0","minFillPrice":"0",
        "cumFillSize":"0","cumFillValue":"0","cumFillFee":"0","cumLiquidateFee":"0","cumRealizePnl":"0","createdTime":"1747203188148",
        "updatedTime":"1747203188148"}''',
    "fill": '''{"id":"738957755401896296","coin":"USDT","symbol":"DOGEUSDT","orderId":"738957755376730472","marginMode":"CROSSED",
        "separatedMode":"COMBINED","separatedOpenOrderId":"0","positionSide":"LONG","orderSide":"BUY","fillSize":"100","fillValue":"9.59500",
        "fillFee":"0.00767600","liquidateFee":"0","realizePnl":"0","direction":"TAKER","createdTime":"1776181258059",
        "updatedTime":"1776181258059"}''',
    "positions": '''{"id":"739004481374519656","coin":"USDT","symbol":"DOGEUSDT","side":"LONG","marginMode":"CROSSED","separatedMode":"COMBINED",
        "separatedOpenOrderId":"0","leverage":"11","size":"100","openValue":"9.31100","openFee":"0.00744880","fundingFee":"0",
        "isolatedMargin":"0","autoAppendIsolatedMargin":false,"cumOpenSize":"100","cumOpenValue":"9.31100","cumOpenFee":"0.00744880",
        "cumCloseSize":"0","cumCloseValue":"0","cumCloseFee":"0","cumFundingFee":"0","cumLiquidateFee":"0",
        "createdMatchSequenceId":"5792711540","updatedMatchSequenceId":"5792711540","createdTime":"1776192398399",
        "updatedTime":"1776192398399"}''',
}


def test_private_frames_have_the_recorded_shape():
    venue = Venue()
    hub, stamp = Hub(venue.x), str(venue.x.now // 10**6)
    session = hub.connect("/contract/v3/ws/private", {"ACCESS-KEY": "weex_a", "ACCESS-PASSPHRASE": "pass", "ACCESS-TIMESTAMP": stamp,
                                                      "ACCESS-SIGN": signature(b"secret", stamp, "", "/v3/ws/private", b"")})
    session.receive('{"id":1,"method":"SUBSCRIBE","params":["orders","fill","positions","account"]}')
    order = {"symbol": "BTCUSDT", "side": "BUY", "positionSide": "LONG", "type": "MARKET", "quantity": "0.01", "newClientOrderId": "w"}
    venue("POST", "/capi/v3/order", json.dumps(order))
    frames = [json.loads(f) for f in session.poll(hub.now)][1:]
    seen = {f["e"]: f for f in frames}
    for channel, recorded in FRAMES.items():
        assert shape(seen[channel]["d"][0]) == shape(json.loads(recorded)), channel
        assert list(seen[channel]) == ["e", "E", "v", "msgEvent", "d"]
    assert [f["v"] for f in frames] == sorted(f["v"] for f in frames)
